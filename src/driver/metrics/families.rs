//! The table of what `--metrics` tells: names, labels, meanings, and where each figure comes from. README's table is made from it.

use crate::engine::meter::{AT_ONCE, LEGS, MODES, REFUSED, TIMED};
use crate::engine::{REASONS, state};
use crate::session::Phase;
use crate::tls::{GROUPS, KINDS, SUITES, VERSIONS};

use super::super::probe::PROBES;
use super::super::renewal::RENEWALS;
use super::{Figures, Samples};

/// One row of the table.
pub(super) struct Family {
    pub(super) name: &'static str,
    pub(super) kind: &'static str,
    /// Its labels, as the manual has them.
    pub(super) labels: &'static [&'static str],
    pub(super) meaning: &'static str,
    pub(super) write: fn(&Figures, &mut Samples<'_>),
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
pub(super) const FAMILIES: [Family; 28] = [
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
    family(
        "starttls_done_total",
        COUNTER,
        &[],
        "those that led to TLS with a server behind it (by `raw`: to HOST's connection)",
        |all, out| {
            out.one(&[], all.sum(|meter| &meter.done));
        },
    ),
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::fmt::Write;

    use super::*;

    #[test]
    fn readme_has_this_table() {
        let mut table = "| metric | type | labels | meaning |\n|---|---|---|---|\n".to_owned();
        for Family { name, kind, labels, meaning, .. } in &FAMILIES {
            writeln!(table, "| `{name}` | {kind} | {} | {meaning} |", labels.join(", ")).unwrap();
        }
        let readme = include_str!("../../../README.md");
        let shown = readme.split_once("<!-- metrics -->\n").and_then(|(_, rest)| rest.split_once("<!-- /metrics -->"));
        assert_eq!(shown.map(|(shown, _)| shown), Some(table.as_str()), "README should have:\n{table}");
    }
}
