//! Bugs of ours. There is no back door to a panic: here the kernel lies (strace's injections), and the program believes it.

use crate::door::Start;
use crate::steps::{At, Standing, ask_child};
use crate::trace::Trace;
use crate::wire::End;

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
