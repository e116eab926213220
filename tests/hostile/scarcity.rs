//! A system that gives too little: descriptors, processes, memory.

use starttls_wrapper::session::Way;

use crate::door::{Door, Start, tls_client};
use crate::steps::all_of;
use crate::trace::Trace;

/// PROG of these tests: a server that needs nothing, which the puppet does.
const SERVER: [&str; 3] = [
    "/bin/sh",
    "-c",
    "echo 220 hello; while read verb rest; do case $verb in QUIT*) echo 221 bye; exit;; *) echo 250 ok;; esac; done",
];

/// What a client came to that asks for STARTTLS, and where it does not get it says QUIT.
fn try_starttls(start: &Start<'_>) -> (String, Option<i32>) {
    let mut door = Door::open(start);
    door.backend.listen();
    let client = door.client.as_mut().unwrap();
    client.listen_for_line();
    let greeting = client.left_over();
    if !greeting.starts_with(b"220") {
        let rest = client.rest().map(|(rest, _)| rest).unwrap_or_default();
        let said = [greeting, rest].concat();
        door.client = None;
        return (String::from_utf8_lossy(&said).into_owned(), door.wait().unwrap().code());
    }
    client.send(b"STARTTLS\r\n");
    // The backend is only there to be dialled; whether it is depends on what is left.
    if let Ok(backend) = door.backend.wire() {
        backend.send(b"220 secure.example\r\n");
    }
    let client = door.client.as_mut().unwrap();
    client.listen_for_line();
    let reply = client.left_over();
    if reply.starts_with(b"220") {
        client.secure(tls_client()).unwrap_or_else(|why| panic!("{why}"));
    }
    client.send(b"QUIT\r\n");
    if reply.starts_with(b"220") {
        let backend = door.backend.wire().unwrap();
        backend.get(b"QUIT\r\n").unwrap();
        backend.send(b"221 bye\r\n");
        backend.end();
    }
    let client = door.client.as_mut().unwrap();
    let (bye, _) = client.rest().unwrap();
    client.end();
    door.client = None;
    let said = [greeting, reply, bye].concat();
    (String::from_utf8_lossy(&said).into_owned(), door.wait().unwrap().code())
}

#[test]
fn with_few_descriptors_a_session_works_or_ends_in_order() {
    let limits: Vec<u32> = (3..=16).collect();
    all_of(&limits, |limit| {
        let option = format!("--nofile={limit}");
        let start = Start {
            through: &["/usr/bin/prlimit", &option],
            program: Some(&SERVER),
            options: &["--replay", "none", "--greeting-timeout", "3"],
            ..Start::default()
        };
        let (said, code) = try_starttls(&start);
        let outcome = format!("{limit} descriptors: {said:?}, exit {code:?}");
        println!("{outcome}");
        let in_order = match code {
            Some(111) => said.starts_with("421 4.3.0"),
            Some(0 | 1) => said.starts_with("220 hello") && said.contains("221 bye"),
            _ => false,
        };
        assert!(in_order, "{outcome}");
    });
}

#[test]
fn without_a_process_left_there_is_a_421() {
    // Root has no such limit; anybody else has.
    let uid = rustix::process::getuid().is_root().then_some(65534);
    for way in [Way::Tls, Way::Respawn] {
        // With a certificate the place of a fresh child is the first process that there is not.
        let certificate = way == Way::Respawn;
        let start = Start { through: &["/usr/bin/prlimit", "--nproc=0"], uid, certificate, way, ..Start::default() };
        let mut door = Door::open(&start);
        let client = door.client.as_mut().unwrap();
        client.get(b"421 4.3.0 Mail server not available\r\n").unwrap_or_else(|why| panic!("{why}; {}", door.said()));
        door.client = None;
        assert_eq!(door.code(), 111);
    }
}

#[test]
fn a_refused_system_call_of_the_start_is_a_421() {
    let calls = ["epoll_create1", "signalfd4", "clone3,vfork,clone", "pipe2"];
    all_of(&calls, |call| {
        let inject = format!("inject={call}:error=EMFILE");
        let trace = Trace::of(&["-e", &inject]);
        let mut door = Door::open(&Start { through: &trace.through(), program: Some(&SERVER), ..Start::default() });
        let client = door.client.as_mut().unwrap();
        let (said, _) = client.rest().unwrap_or_else(|why| panic!("{why}"));
        door.client = None;
        let status = door.wait().unwrap();
        let said = String::from_utf8_lossy(&said).into_owned();
        assert!(said.starts_with("421 4.3.0"), "{said:?}, {status}: {}", door.said());
        assert_eq!(status.code(), Some(111));
    });
}

#[test]
fn a_refused_system_call_of_the_handover_is_a_454() {
    let calls = ["socket", "connect"];
    all_of(&calls, |call| {
        let inject = format!("inject={call}:error=EMFILE");
        let trace = Trace::of(&["-e", &inject]);
        let mut door = Door::open(&Start { through: &trace.through(), program: Some(&SERVER), ..Start::default() });
        door.backend.listen();
        let client = door.client.as_mut().unwrap();
        client.get(b"220 hello\n").unwrap();
        client.send(b"STARTTLS\r\n");
        client.get(b"454 4.7.0 TLS not available\r\n").unwrap();
        client.send(b"QUIT\r\n");
        client.get(b"221 bye\n").unwrap();
        door.client = None;
        assert_eq!(door.code(), 0);
    });
}
