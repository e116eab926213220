//! Bugs of ours. There is no back door to a panic: here the kernel lies (strace's injections), and the program believes it.

use crate::child::Child;
use crate::door::{Door, Shape, Start};
use crate::steps::{At, Standing, ask_child};
use crate::stream::wait_until;
use crate::trace::Trace;
use crate::wire::{End, PATIENCE, Wire};

/// Reads of a session's start that tell the truth.
const TRUE_READS: usize = 10;

#[test]
fn a_panic_is_exit_101_and_one_line_and_nobody_hears_a_word() {
    // More octets than the room that was offered.
    let lie = format!("inject=read:retval=100000:when={}+", TRUE_READS + 1);
    let trace = Trace::of(&["-e", "trace=read", "-e", &lie]);
    let start = Start { through: &trace.through(), ..Start::default() };
    let mut standing = Standing::at(At::Snoop, &start);
    let asked = (0..=TRUE_READS)
        .take_while(|_| ask_child(&mut standing.door, &mut standing.child, "NOOP\r\n", "250 Ok\r\n").is_ok());
    assert!(asked.count() <= TRUE_READS, "it does not believe the kernel");
    let (said, end) = standing.door.client.as_mut().unwrap().rest().unwrap();
    assert!(matches!(end, End::Clean | End::Reset), "{end:?}");
    assert!(!said.windows(4).any(|part| part == b"421 "), "{}", said.escape_ascii());
    // The child hears the end of its input, as when its client goes.
    let _ = standing.child.rest().unwrap();
    standing.child.exit(0);
    assert_eq!(standing.door.code(), 101, "{}", standing.door.said());
    let log = standing.door.said();
    assert_eq!(log.lines().count(), 1, "{log}");
    assert!(log.contains("]: error: bug: panicked at src/"), "{log}");
    assert!(trace.log().contains("(INJECTED)"));
}

/// One lie alone, which meets whichever session reads just then: one of two that stand. A third comes behind it.
#[test]
fn a_panic_in_one_session_of_a_listener_ends_that_one_and_no_other() {
    let lie = format!("inject=read:retval=100000:when={}", 4 * TRUE_READS);
    let trace = Trace::of(&["-f", "-e", "trace=read", "-e", &lie]);
    let mut door = Door::open(&Start { through: &trace.through(), shape: Shape::Listener, ..Start::USUAL });
    let begin = |door: &mut Door| -> (Wire, Child) {
        let mut child = Child::accept(&door.puppets).unwrap();
        child.send(b"220 mx\r\n");
        let mut client = door.client.take().unwrap();
        client.get(b"220 mx\r\n").unwrap();
        (client, child)
    };
    let ask = |(client, child): &mut (Wire, Child)| {
        client.send(b"NOOP\r\n");
        child.get(b"NOOP\r\n")?;
        child.send(b"250 ok\r\n");
        client.get(b"250 ok\r\n")
    };
    let mut other = begin(&mut door);
    door.connect();
    let mut one = begin(&mut door);
    let asked = (0..4 * TRUE_READS).take_while(|_| ask(&mut one).is_ok()).count();
    assert!(asked < 4 * TRUE_READS, "it does not believe the kernel");
    let told = "a bug of ours has ended this session";
    assert!(wait_until(PATIENCE, || door.said().contains(told)), "{}", door.said());
    assert!(matches!(one.0.rest().unwrap().1, End::Clean | End::Reset));
    one.1.exit(0);
    ask(&mut other).unwrap();
    door.connect();
    ask(&mut begin(&mut door)).unwrap();
    let said = door.said();
    assert!(said.contains("]: error: bug: panicked at src/") && said.matches(told).count() == 1, "{said}");
    assert!(!said.contains("a bug of ours has ended a loop"), "{said}");
}
