//! Every dialogue through the pure session, in simulated time: whole, octet by octet, cut in two at every place, and cut
//! at random, always with the same outcome.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a test fails by panicking

mod support;

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use dialogue::{Deed, Dialogue, Doors};
use pure::{Cut, play};
use starttls_wrapper::session::Way;
use support::*;

/// The program's own; musl's makes seventy thousand runs take minutes.
#[cfg(target_env = "musl")]
#[global_allocator]
static ALLOCATOR: dlmalloc::GlobalDlmalloc = dlmalloc::GlobalDlmalloc;

fn dialogues() -> Vec<Dialogue> {
    let mut dialogues = dialogue::all().unwrap_or_else(|why| panic!("{why}"));
    dialogues.retain(|dialogue| dialogue.doors != Doors::Real);
    let (dialogues, count) = ways::all(&dialogues);
    println!("{count}");
    dialogues
}

/// Plays each dialogue with all the cuts that `cuts` gives for it, on all processors; the first failure of each counts.
fn hold(how: &str, cuts: impl Fn(&Dialogue) -> Vec<Cut> + Sync) {
    let (dialogues, next) = (dialogues(), AtomicUsize::new(0));
    let play_some = || {
        let (mut runs, mut failures) = (0, Vec::new());
        while let Some(dialogue) = dialogues.get(next.fetch_add(1, Ordering::Relaxed)) {
            for cut in cuts(dialogue) {
                runs += 1;
                if let Err(why) = play(dialogue, cut) {
                    failures.push(why);
                    break;
                }
            }
        }
        (runs, failures)
    };
    let processors = thread::available_parallelism().unwrap().get();
    let (runs, failures) = thread::scope(|scope| {
        let players: Vec<_> = (0..processors).map(|_| scope.spawn(play_some)).collect();
        let played = players.into_iter().map(|player| player.join().unwrap());
        played.fold((0, Vec::new()), |sum, one| (sum.0 + one.0, [sum.1, one.1].concat()))
    });
    println!("{} dialogues {how}, {runs} runs, {} failed", dialogues.len(), failures.len());
    assert!(
        failures.is_empty(),
        "{} of {} failed {how}:\n\n{}",
        failures.len(),
        dialogues.len(),
        failures.join("\n\n")
    );
}

/// The dialogues whose outcome does not depend on what comes together.
fn if_cuttable(dialogue: &Dialogue, cuts: Vec<Cut>) -> Vec<Cut> {
    if dialogue.whole { Vec::new() } else { cuts }
}

/// The table of `support/ways.rs` would pass with nothing in it.
#[test]
fn every_way_has_dialogues_through_tls_and_without() {
    let ready = Deed::Gets(dialogue::Side::Client, b"220 2.0.0 Ready to start TLS\r\n".to_vec());
    for way in Way::EVERY {
        let of_it: Vec<_> = dialogues().into_iter().filter(|dialogue| dialogue.way == way).collect();
        let secure = of_it.iter().filter(|dialogue| dialogue.steps.iter().any(|step| step.deed == ready)).count();
        // Behind the TLS of another there is no 220, and nothing without.
        let is_enough = if way == Way::Mute { of_it.len() >= 40 } else { secure >= 30 && of_it.len() - secure >= 100 };
        assert!(is_enough, "{way}: {secure} of {}", of_it.len());
    }
}

#[test]
fn every_dialogue_holds() {
    hold("whole", |_| vec![Cut::Whole]);
}

#[test]
fn every_dialogue_holds_octet_by_octet() {
    hold("octet by octet", |dialogue| if_cuttable(dialogue, vec![Cut::Octets]));
}

#[test]
fn every_dialogue_holds_cut_at_random() {
    hold("cut at random", |dialogue| if_cuttable(dialogue, (1..=50).map(Cut::Random).collect()));
}

#[test]
fn every_dialogue_holds_cut_in_two_anywhere() {
    hold("cut in two", |dialogue| if_cuttable(dialogue, two_way_cuts(dialogue)));
}

/// Every place in every segment; in segments of many kilobytes the places near their ends and a few between.
fn two_way_cuts(dialogue: &Dialogue) -> Vec<Cut> {
    const EVERYWHERE: usize = 2000;
    let mut cuts = Vec::new();
    let segments = dialogue.steps.iter().filter_map(|step| match &step.deed {
        Deed::Sends(_, octets) => Some(octets.len()),
        _ => None,
    });
    for (segment, length) in segments.enumerate() {
        let places = (1..length).filter(|at| length <= EVERYWHERE || *at < 50 || length - at < 50 || at % 4093 < 10);
        cuts.extend(places.map(|at| Cut::InTwo { segment, at }));
    }
    cuts
}

fn refusal(text: &str) -> String {
    dialogue::parse(Path::new("x.txt"), text).map_or_else(|why| why.to_string(), |_| "read".to_owned())
}

#[test]
fn a_malformed_dialogue_is_refused_with_its_line() {
    let head = "# A claim.\n# source: somewhere\n";
    assert_eq!(refusal(&format!("{head}C: NOOP\n")), "read");
    assert!(refusal("C: NOOP\n").starts_with("x.txt:1: "));
    assert!(refusal("# A claim.\nC: NOOP\n").starts_with("x.txt:2: "));
    for wrong in
        ["Q: x", "C: \\q", "C: \\x4", "C: \\*3x", "! client-gone", "= exit x", "doors: open", "nonsense", "! wait x"]
    {
        assert!(refusal(&format!("{head}C: NOOP\n{wrong}\n")).starts_with("x.txt:4: "), "{wrong}");
    }
    assert!(refusal(&format!("{head}C: NOOP\n= exit 0\nC: NOOP\n")).starts_with("x.txt:5: "));
    assert!(refusal(&format!("{head}C: NOOP\noptions: -v\n")).starts_with("x.txt:4: "));
}

#[test]
fn texts_are_read_as_the_format_says() {
    let text = "# A claim.\n# source: somewhere\noptions: --replay none\ncert: none\nC: a\\tb\\x00\\\\c\nC: \\*3{x\\n}y\\c\nS:  z \n= exit 9\n";
    let dialogue = dialogue::parse(Path::new("x.txt"), text).unwrap();
    let deeds: Vec<_> = dialogue.steps.iter().map(|step| &step.deed).collect();
    let sent = b"a\tb\0\\c\r\nx\nx\nx\ny".to_vec();
    let got = b" z \r\n".to_vec();
    assert_eq!(deeds, [&Deed::Sends(dialogue::Side::Client, sent), &Deed::Gets(dialogue::Side::Client, got)]);
    assert_eq!(
        (dialogue.options.join(" "), dialogue.certificate, dialogue.exit),
        ("--replay none".to_owned(), false, Some((8, 9)))
    );
}
