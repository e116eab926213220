//! What a listener says of itself (`--metrics`): the table of its figures, and the text in which Prometheus takes them. README has the
//! same table, and a test compares.
//!
//! Rejected: the crate prometheus-client. It brings a procedural macro, which cannot be built where the host's own target is linked
//! statically (`cargo build` on glibc); and what it spares here, figures that stand elsewhere being given to it one by one, is a line each.

use std::fmt::{Display, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::engine::meter::{AT_ONCE, BOUNDS, Count, LEGS, MODES, Meter, REFUSED, TIMED};
use crate::engine::{REASONS, state};
use crate::session::Phase;
use crate::tls::{GROUPS, KINDS, SUITES, VERSIONS};

use super::admission::Admission;
use super::probe::{PROBES, Shared};
use super::renewal::{Current, RENEWALS};
use super::worker::{House, Stage};

/// Whether the process serves, and all that is counted in it.
#[derive(Debug)]
pub(super) struct Figures {
    /// One for each loop.
    meters: Vec<Arc<Meter>>,
    learned: Arc<Shared>,
    current: Arc<Current>,
    admission: Arc<Admission>,
    /// [`Stage`].
    stage: Arc<AtomicU8>,
    started: f64,
}

impl Figures {
    pub(super) fn of(meters: Vec<Arc<Meter>>, house: &House) -> Self {
        let started = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64());
        Self {
            meters,
            learned: house.learned.clone(),
            current: house.setups.clone(),
            admission: house.admission.clone(),
            stage: house.stage.clone(),
            started,
        }
    }

    /// Whether whoever chooses among several of us should choose this one.
    pub(super) fn is_serving(&self) -> bool {
        !self.is_draining() && self.running() == self.meters.len()
    }

    fn is_draining(&self) -> bool {
        self.stage.load(Ordering::Relaxed) != Stage::Serve as u8
    }

    fn running(&self) -> usize {
        self.meters.iter().filter(|meter| meter.is_running.load(Ordering::Relaxed)).count()
    }

    fn sum(&self, one: impl Fn(&Meter) -> &Count) -> u64 {
        self.meters.iter().map(|meter| one(meter).value()).sum()
    }
}

/// A loop that runs; that it does no longer is seen when this goes, with its thread.
#[derive(Debug)]
pub(super) struct Running(Arc<Meter>);

impl Running {
    pub(super) fn new(meter: Arc<Meter>) -> Self {
        meter.is_running.store(true, Ordering::Relaxed);
        Self(meter)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.is_running.store(false, Ordering::Relaxed);
    }
}

/// One row of the table.
struct Family {
    name: &'static str,
    kind: &'static str,
    /// Its labels, as the manual has them.
    labels: &'static [&'static str],
    meaning: &'static str,
    write: fn(&Figures, &mut Samples<'_>),
}

const fn family(
    name: &'static str,
    kind: &'static str,
    labels: &'static [&'static str],
    meaning: &'static str,
    write: fn(&Figures, &mut Samples<'_>),
) -> Family {
    Family { name, kind, labels, meaning, write }
}

const COUNTER: &str = "counter";
const GAUGE: &str = "gauge";
const HISTOGRAM: &str = "histogram";

/// The table.
const FAMILIES: [Family; 28] = [
    family("build_info", GAUGE, &["version"], "always 1", |_, out| {
        out.one(&[env!("CARGO_PKG_VERSION")], 1);
    }),
    family("start_time_seconds", GAUGE, &[], "when the process began, since 1970", |all, out| {
        out.one(&[], all.started);
    }),
    family("draining", GAUGE, &[], "1: no client is accepted any more", |all, out| {
        out.one(&[], u8::from(all.is_draining()));
    }),
    family("loops", GAUGE, &["state"], "loops that are `running`, or `gone`", |all, out| {
        let running = all.running();
        out.one(&["running"], running);
        out.one(&["gone"], all.meters.len() - running);
    }),
    family(
        "loop_restarts_total",
        COUNTER,
        &[],
        "loops that a bug of ours has ended, and that were begun again",
        |all, out| {
            out.one(&[], all.sum(|meter| &meter.restarts));
        },
    ),
    family("sessions", GAUGE, &["state"], "sessions at present, by what they do", |all, out| {
        for phase in Phase::ALL {
            out.one(&[state(phase)], all.sum(|meter| &meter.states[phase as usize]));
        }
    }),
    family("sessions_limit", GAUGE, &[], "how many there may be: the limit in force", |all, out| {
        out.one(&[], all.admission.most());
    }),
    family(
        "places_taken",
        GAUGE,
        &[],
        "how many of these are taken, by sessions and by connections without their PROXY header",
        |all, out| {
            out.one(&[], all.admission.taken());
        },
    ),
    family("stress", GAUGE, &[], "1: places are scarce, and who begins has short time-outs", |all, out| {
        out.one(&[], u8::from(all.admission.is_scarce()));
    }),
    family("connections_accepted_total", COUNTER, &[], "connections taken from the kernel", |all, out| {
        out.one(&[], all.sum(|meter| &meter.accepted));
    }),
    family(
        "connections_refused_total",
        COUNTER,
        &["limit"],
        "those not served: `sessions`, `address` or `rate` exceeded, `proxy` missing",
        |all, out| {
            for (at, limit) in REFUSED.into_iter().enumerate() {
                out.one(&[limit], all.sum(|meter| &meter.refused[at]));
            }
        },
    ),
    family("accept_pauses_total", COUNTER, &[], "pauses in accepting: no descriptor or memory was free", |all, out| {
        out.one(&[], all.sum(|meter| &meter.pauses));
    }),
    family("sessions_begun_total", COUNTER, &[], "sessions that began", |all, out| {
        out.one(&[], all.sum(|meter| &meter.begun));
    }),
    family("sessions_ended_total", COUNTER, &["reason"], "those that ended, by how", |all, out| {
        for (at, reason) in REASONS.into_iter().enumerate() {
            out.one(&[reason], all.sum(|meter| &meter.ended[at]));
        }
    }),
    family("starttls_offered_total", COUNTER, &[], "sessions that were shown STARTTLS", |all, out| {
        out.one(&[], all.sum(|meter| &meter.offered));
    }),
    family("starttls_asked_total", COUNTER, &[], "STARTTLS commands that had their turn", |all, out| {
        out.one(&[], all.sum(|meter| &meter.asked));
    }),
    family("starttls_done_total", COUNTER, &[], "those that led to TLS with a server behind it", |all, out| {
        out.one(&[], all.sum(|meter| &meter.done));
    }),
    family("starttls_failed_total", COUNTER, &["step"], "those that did not, by where they failed", |all, out| {
        for (at, step) in AT_ONCE.into_iter().enumerate() {
            out.one(&[step], all.sum(|meter| &meter.failed_at_once[at]));
        }
        for phase in STEPS {
            out.one(&[state(phase)], all.sum(|meter| &meter.failed[phase as usize]));
        }
    }),
    family(
        "tls_handshakes_total",
        COUNTER,
        &["leg", "version", "kind"],
        "TLS handshakes done; kind: `full`, `hello_retry` or `resumed`",
        |all, out| {
            for (leg, whose) in LEGS.into_iter().enumerate() {
                for (version, tls) in VERSIONS.into_iter().enumerate() {
                    for (kind, how) in KINDS.into_iter().enumerate() {
                        let sum = all.sum(|meter| &meter.handshakes[leg].done[version][kind]);
                        out.one(&[whose, tls, how], sum);
                    }
                }
            }
        },
    ),
    family("tls_suites_total", COUNTER, &["leg", "suite"], "the same by cipher suite", |all, out| {
        for (leg, whose) in LEGS.into_iter().enumerate() {
            for (at, suite) in SUITES.into_iter().enumerate() {
                out.one(&[whose, suite], all.sum(|meter| &meter.handshakes[leg].suites[at]));
            }
        }
    }),
    family(
        "tls_groups_total",
        COUNTER,
        &["leg", "group"],
        "the same by key exchange group, where keys were exchanged",
        |all, out| {
            for (leg, whose) in LEGS.into_iter().enumerate() {
                for (at, group) in GROUPS.into_iter().enumerate() {
                    out.one(&[whose, group], all.sum(|meter| &meter.handshakes[leg].groups[at]));
                }
            }
        },
    ),
    family(
        "bytes_total",
        COUNTER,
        &["direction", "mode"],
        "octets of clients' connections, `received` or `sent`, in `plain`, `tls` or `raw`",
        |all, out| {
            for (direction, way) in ["received", "sent"].into_iter().enumerate() {
                for (at, mode) in MODES.into_iter().enumerate() {
                    out.one(&[way, mode], all.sum(|meter| &meter.octets[direction][at]));
                }
            }
        },
    ),
    family(
        "plaintext_servers_summoned_total",
        COUNTER,
        &[],
        "sessions for which PROG was to be started, or the daemon connected to",
        |all, out| {
            out.one(&[], all.sum(|meter| &meter.summoned));
        },
    ),
    family(
        "plaintext_servers_avoided_total",
        COUNTER,
        &[],
        "sessions that ended without one, thanks to `--lazy`",
        |all, out| {
            out.one(&[], all.sum(|meter| &meter.avoided));
        },
    ),
    family(
        "plaintext_server_learned",
        GAUGE,
        &[],
        "1: what PROG would say is known, and said in its place",
        |all, out| {
            out.one(&[], u8::from(all.learned.get().is_some()));
        },
    ),
    family(
        "plaintext_server_probes_total",
        COUNTER,
        &["outcome"],
        "probing sessions: it was as before (`same`), was not (`changed`), did not answer (`failed`)",
        |all, out| {
            for (at, outcome) in PROBES.into_iter().enumerate() {
                out.one(&[outcome], all.learned.probes[at].value());
            }
        },
    ),
    family(
        "renewals_total",
        COUNTER,
        &["outcome"],
        "SIGHUPs: certificate, key and roots were read again (`done`), or stay as they were (`failed`)",
        |all, out| {
            for (at, outcome) in RENEWALS.into_iter().enumerate() {
                out.one(&[outcome], all.current.renewals[at].value());
            }
        },
    ),
    family("step_seconds", HISTOGRAM, &["step"], "how long a step took that succeeded", |all, out| {
        for (at, phase) in TIMED.into_iter().enumerate() {
            out.times(all, at, state(phase));
        }
    }),
];

/// Where STARTTLS can fail; `snoop`: something came behind it, or nobody was left.
const STEPS: [Phase; 10] = [
    Phase::Snoop,
    Phase::Dial,
    Phase::SecureBackend,
    Phase::Start,
    Phase::Tell,
    Phase::Greeting,
    Phase::Replay,
    Phase::Commit,
    Phase::Announce,
    Phase::SecureClient,
];

/// The samples of one family.
struct Samples<'a> {
    text: &'a mut String,
    name: &'static str,
    labels: &'static [&'static str],
}

/// Before each name.
const PREFIX: &str = "starttls_wrapper";

impl Samples<'_> {
    /// With a word for each label.
    fn one(&mut self, words: &[&str], value: impl Display) {
        self.line("", words, None, value);
    }

    // Writing into a string never fails. The words are ours, with nothing to escape.
    fn line(&mut self, suffix: &str, words: &[&str], bound: Option<&str>, value: impl Display) {
        let _ = write!(self.text, "{PREFIX}_{}{suffix}", self.name);
        let labels = self.labels.iter().zip(words).chain(bound.iter().map(|bound| (&"le", bound)));
        let mut end = "";
        for (label, word) in labels {
            let before = if end.is_empty() { '{' } else { ',' };
            let _ = write!(self.text, "{before}{label}=\"{word}\"");
            end = "}";
        }
        let _ = writeln!(self.text, "{end} {value}");
    }

    fn times(&mut self, all: &Figures, at: usize, step: &str) {
        let mut sum = 0;
        for (number, bound) in BOUNDS.iter().map(|bound| seconds(*bound)).chain(["+Inf".to_owned()]).enumerate() {
            sum += all.sum(|meter| &meter.times[at].counts[number]);
            self.line("_bucket", &[step], Some(&bound), sum);
        }
        self.line("_sum", &[step], None, seconds(all.sum(|meter| &meter.times[at].sum)));
        self.line("_count", &[step], None, sum);
    }
}

fn seconds(micros: u64) -> String {
    let text = format!("{}.{:06}", micros / 1_000_000, micros % 1_000_000);
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// All of it, in Prometheus' text format 0.0.4.
pub(super) fn text(figures: &Figures) -> String {
    let mut text = String::with_capacity(32 * 1024);
    for Family { name, kind, labels, meaning, write } in &FAMILIES {
        let meaning = meaning.replace('`', "");
        let _ = writeln!(text, "# HELP {PREFIX}_{name} {meaning}\n# TYPE {PREFIX}_{name} {kind}");
        write(figures, &mut Samples { text: &mut text, name, labels });
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readme_has_this_table() {
        let mut table = "| metric | type | labels | meaning |\n|---|---|---|---|\n".to_owned();
        for Family { name, kind, labels, meaning, .. } in &FAMILIES {
            writeln!(table, "| `{name}` | {kind} | {} | {meaning} |", labels.join(", ")).unwrap();
        }
        let readme = include_str!("../../README.md");
        let shown = readme.split_once("<!-- metrics -->\n").and_then(|(_, rest)| rest.split_once("<!-- /metrics -->"));
        assert_eq!(shown.map(|(shown, _)| shown), Some(table.as_str()), "README should have:\n{table}");
    }

    fn figures(meters: Vec<Arc<Meter>>) -> Figures {
        let learned = Arc::new(Shared::new().unwrap());
        Figures {
            meters,
            learned,
            current: Arc::default(),
            admission: Admission::new(7, None),
            stage: Arc::new(AtomicU8::new(Stage::Serve as u8)),
            started: 1.5,
        }
    }

    #[test]
    fn health_is_that_of_all_loops_and_ends_with_the_service() {
        let meters: Vec<Arc<Meter>> = (0..2).map(|_| Arc::default()).collect();
        let figures = figures(meters.clone());
        assert!(!figures.is_serving());
        let mut running: Vec<Running> = meters.into_iter().map(Running::new).collect();
        assert!(figures.is_serving());
        let one = running.remove(0);
        let thread = std::thread::spawn(move || {
            let _running = one;
            panic!("as a loop may");
        });
        assert!(thread.join().is_err() && !figures.is_serving());
        assert!(text(&figures).contains("loops{state=\"running\"} 1\nstarttls_wrapper_loops{state=\"gone\"} 1\n"));
        running.push(Running::new(figures.meters[0].clone()));
        assert!(figures.is_serving());
        for stage in [Stage::Drain, Stage::End] {
            figures.stage.store(stage as u8, Ordering::Relaxed);
            assert!(!figures.is_serving());
        }
    }

    #[test]
    fn loops_are_added_up_and_buckets_hold_all_below_them() {
        let meters: Vec<Arc<Meter>> = (0..2).map(|_| Arc::default()).collect();
        meters.iter().for_each(|meter| meter.asked.up());
        for (meter, bucket) in [(0, 0), (1, 0), (0, 2), (1, BOUNDS.len())] {
            meters[meter].times[0].counts[bucket].up();
        }
        let text = text(&figures(meters));
        for line in [
            "starttls_wrapper_starttls_asked_total 2",
            "starttls_wrapper_sessions_limit 7",
            "starttls_wrapper_loops{state=\"gone\"} 2",
            "starttls_wrapper_step_seconds_bucket{step=\"summon\",le=\"0.00025\"} 2",
            "starttls_wrapper_step_seconds_bucket{step=\"summon\",le=\"0.0005\"} 2",
            "starttls_wrapper_step_seconds_bucket{step=\"summon\",le=\"0.001\"} 3",
            "starttls_wrapper_step_seconds_bucket{step=\"summon\",le=\"30\"} 3",
            "starttls_wrapper_step_seconds_bucket{step=\"summon\",le=\"+Inf\"} 4",
            "starttls_wrapper_step_seconds_count{step=\"summon\"} 4",
            "starttls_wrapper_step_seconds_sum{step=\"summon\"} 0",
        ] {
            assert!(text.lines().any(|said| said == line), "{line} is not in\n{text}");
        }
    }

    #[test]
    fn seconds_have_no_zeros_that_say_nothing() {
        for (micros, text) in [(0, "0"), (250, "0.00025"), (1_000_000, "1"), (30_000_000, "30"), (1_500_000, "1.5")] {
            assert_eq!(seconds(micros), text);
        }
    }
}
