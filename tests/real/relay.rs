//! Long letters: whole in both modes, and in clear moved by the kernel alone.

use crate::clients::{Mode, curl};
use crate::front::{Front, Identity, MAILFRONT, sessions_ended_well, tcpserver, wrapper};
use crate::letter::{Queue, long_letter};
use crate::stage::Stage;

const LONG: usize = 24 << 20;

#[test]
fn a_letter_of_many_megabytes_arrives_whole_in_clear() {
    let (front, long) = (Front::new(&[]), long_letter("long", LONG));
    curl(&front.stage, front.at, Mode::Clear, &front.identity, &long);
    front.delivered(false, &long);
}

#[test]
fn a_letter_of_many_megabytes_arrives_whole_through_tls() {
    let (front, long) = (Front::new(&[]), long_letter("long", LONG));
    curl(&front.stage, front.at, Mode::Tls13, &front.identity, &long);
    front.delivered(true, &long);
}

/// How many octets the wrapper moved by splice, and how many by reading, while it took a letter of [`LONG`] octets in clear.
#[track_caller]
fn moved(options: &[&str]) -> (usize, usize) {
    let stage = Stage::new();
    let (identity, child, long) =
        (Identity::self_signed(&stage, "own"), Queue::new(&stage, "child"), long_letter("long", LONG));
    let (nobody, trace) = (stage.unused_port(), stage.path("trace"));
    let strace = ["strace", "-e", "trace=splice,read,readv,recvfrom,recvmsg", "-e", "signal=none", "-o"];
    let mut argv: Vec<_> = strace.iter().map(Into::into).collect();
    argv.push(trace.clone().into());
    argv.extend(wrapper(&identity, options, nobody, &MAILFRONT));
    let at = tcpserver(&stage, "front", &argv, &child);
    curl(&stage, at, Mode::Clear, &identity, &long);
    child.holds(&long);
    sessions_ended_well(&stage);
    let trace = std::fs::read_to_string(trace).expect("a trace");
    let sum = |spliced: bool| {
        let lines = trace.lines().filter(|line| line.starts_with("splice(") == spliced);
        lines.filter_map(|line| line.rsplit_once(" = ")?.1.parse::<usize>().ok()).sum()
    };
    (sum(true), sum(false))
}

#[test]
fn what_follows_the_cutoff_is_spliced_and_not_read() {
    let (spliced, read) = moved(&[]);
    assert!(spliced >= LONG, "{spliced} octets spliced");
    assert!(read < 64 << 10, "{read} octets read");
}

#[test]
fn relay_copy_reads_all_of_it() {
    let (spliced, read) = moved(&["--relay", "copy"]);
    assert_eq!(spliced, 0);
    assert!(read >= LONG, "{read} octets read");
}
