//! What a listener says of itself (`--metrics`): the table of its figures, and the text in which Prometheus takes them. README has the
//! same table, and a test compares.
//!
//! Rejected: the crate prometheus-client. It brings a procedural macro, which cannot be built where the host's own target is linked
//! statically (`cargo build` on glibc); and what it spares here, figures that stand elsewhere being given to it one by one, is a line each.

mod families;

use std::fmt::{Display, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::engine::meter::{BOUNDS, Count, Meter};

use super::admission::Admission;
use super::probe::Shared;
use super::renewal::Current;
use super::worker::{House, Stage};
use families::{FAMILIES, Family};

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
