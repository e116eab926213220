//! A listener's figures (`--metrics`): each is what the sessions were, they come to rest when the sessions do, they are written as
//! Prometheus wants them and README lists them, and whoever asks for them badly harms nobody.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::Command;

use rustix::process::Signal;
use starttls_wrapper::session::Way;

use crate::child::Child;
use crate::dialogue::Backend;
use crate::door::{Door, Shape, Start, certificate, free_address, tls_client_of};
use crate::lazy::{CERTAIN, EHLO, Stage};
use crate::page::{Page, ask, status};
use crate::scripted::GREETING;
use crate::stream::wait_until;
use crate::wire::PATIENCE;

/// When all sessions are over.
fn at_rest(address: SocketAddr) -> Page {
    assert!(wait_until(PATIENCE, || Page::of(address).sessions() == 0.0), "{:?}", Page::of(address).samples);
    Page::of(address)
}

fn expect(page: &Page, expected: &[(&str, u64)]) {
    assert_eq!(page.counted(), expected.iter().copied().collect::<BTreeMap<_, _>>());
}

/// The octets that the summary lines of the log add up to: received, sent.
fn logged(door: &Door) -> [u64; 2] {
    ["received=", "sent="].map(|word| {
        let said = door.said();
        said.split_whitespace().filter_map(|field| field.strip_prefix(word)?.parse::<u64>().ok()).sum()
    })
}

/// Octets in each direction, and in each mode.
fn octets(page: &Page) -> [[u64; 3]; 2] {
    ["received", "sent"].map(|direction| {
        ["plain", "tls", "raw"]
            .map(|mode| page.value(&format!("bytes_total{{direction=\"{direction}\",mode=\"{mode}\"}}")) as u64)
    })
}

const QUIT: (&str, &str) = ("QUIT\r\n", "221 bye\r\n");
const STARTTLS: (&str, &str) = ("STARTTLS\r\n", "220 2.0.0 Ready to start TLS\r\n");
const NOT_NOW: (&str, &str) = ("STARTTLS\r\n", "454 4.7.0 TLS not available\r\n");

/// A client that is past its EHLO.
fn next(stage: &mut Stage) {
    stage.door.connect();
    stage.talk(&[("", "220 mx\r\n"), EHLO]);
}

fn reach_backend(stage: &mut Stage, reply: &str) {
    stage.door.client.as_mut().unwrap().send(b"STARTTLS\r\n");
    let backend = stage.door.backend.wire().unwrap();
    backend.send(b"220 b\r\n");
    backend.get(b"EHLO c.example\r\n").unwrap();
    backend.send(reply.as_bytes());
}

#[test]
fn every_figure_is_what_the_sessions_were() {
    let address = free_address();
    let place = address.to_string();
    let mut stage = Stage::new(GREETING, &Start { options: &["--lazy", "--metrics", &place], ..Start::USUAL });
    stage.says(CERTAIN);
    // The client that is there already, and another: bots.
    stage.talk(&[("", "220 mx\r\n"), EHLO, QUIT]);
    next(&mut stage);
    stage.talk(&[QUIT]);
    // Mail in plaintext.
    next(&mut stage);
    stage.talk(&[("MAIL FROM:<a@b>\r\n", "250 MAIL FROM:<a@b>\r\n"), QUIT]);
    // Nobody listens at HOST; who answers is not HOST; the server refuses the client; the client gives up.
    next(&mut stage);
    stage.talk(&[NOT_NOW]);
    stage.door.backend.play(Backend::Untrusted);
    stage.talk(&[NOT_NOW, QUIT]);
    next(&mut stage);
    reach_backend(&mut stage, "550 no\r\n");
    stage.talk(&[("", NOT_NOW.1), QUIT]);
    stage.door.backend.forget();
    // More behind STARTTLS; no TLS behind the 220.
    next(&mut stage);
    stage.talk(&[("STARTTLS\r\nNOOP\r\n", "")]);
    stage.door.client.as_mut().unwrap().rest().unwrap();
    next(&mut stage);
    reach_backend(&mut stage, "250 b\r\n");
    stage.talk(&[("", STARTTLS.1), ("GET / HTTP/1.0\r\n\r\n", "")]);
    stage.door.client.as_mut().unwrap().rest().unwrap();
    stage.door.backend.forget();
    // And one that does as it should.
    next(&mut stage);
    reach_backend(&mut stage, "250 b\r\n");
    stage.talk(&[("", STARTTLS.1)]);
    // One of its own, that has learned nothing of the groups of others' servers.
    stage.door.client.as_mut().unwrap().secure(tls_client_of(&certificate())).unwrap();
    // Its handshake is over before ours is.
    let alone = |page: &Page| (page.sessions(), page.value("sessions{state=\"gate\"}")) == (1.0, 1.0);
    assert!(wait_until(PATIENCE, || alone(&Page::of(address))), "{:?}", Page::of(address).counted());
    let page = Page::of(address);
    assert_eq!(page.value("starttls_done_total"), 1.0, "not only at the end");
    stage.talk(&[("EHLO c\r\n", "")]);
    let backend = stage.door.backend.wire().unwrap();
    backend.get(b"EHLO c\r\n").unwrap();
    backend.send(b"250 b\r\n");
    stage.talk(&[("", "250 b\r\n"), ("QUIT\r\n", "")]);
    assert!(wait_until(PATIENCE, || Page::of(address).value("sessions{state=\"relay_tls\"}") == 1.0));
    let backend = stage.door.backend.wire().unwrap();
    backend.get(b"QUIT\r\n").unwrap();
    backend.send(b"221 bye\r\n");
    backend.end();
    stage.talk(&[("", "221 bye\r\n")]);
    stage.door.client.as_mut().unwrap().end();
    let page = at_rest(address);
    expect(
        &page,
        &[
            ("connections_accepted_total", 8),
            ("sessions_begun_total", 8),
            ("sessions_ended_total{reason=\"over\"}", 6),
            ("sessions_ended_total{reason=\"client_bytes_after_starttls\"}", 1),
            ("sessions_ended_total{reason=\"handshake\"}", 1),
            ("starttls_offered_total", 8),
            ("starttls_asked_total", 6),
            ("starttls_done_total", 1),
            ("starttls_failed_total{step=\"snoop\"}", 1),
            ("starttls_failed_total{step=\"dial\"}", 1),
            ("starttls_failed_total{step=\"backend_handshake\"}", 1),
            ("starttls_failed_total{step=\"replay\"}", 1),
            ("starttls_failed_total{step=\"client_handshake\"}", 1),
            ("tls_handshakes_total{leg=\"client\",version=\"TLSv1.3\",kind=\"full\"}", 1),
            ("tls_handshakes_total{leg=\"backend\",version=\"TLSv1.3\",kind=\"full\"}", 3),
            ("tls_suites_total{leg=\"client\",suite=\"TLS_AES_128_GCM_SHA256\"}", 1),
            ("tls_suites_total{leg=\"backend\",suite=\"TLS_AES_128_GCM_SHA256\"}", 3),
            ("tls_groups_total{leg=\"client\",group=\"X25519MLKEM768\"}", 1),
            ("tls_groups_total{leg=\"backend\",group=\"X25519MLKEM768\"}", 3),
            ("plaintext_servers_summoned_total", 1),
            ("plaintext_servers_avoided_total", 7),
            ("step_seconds_count{step=\"summon\"}", 1),
            ("step_seconds_count{step=\"brief\"}", 1),
            ("step_seconds_count{step=\"dial\"}", 4),
            ("step_seconds_count{step=\"backend_handshake\"}", 3),
            ("step_seconds_count{step=\"backend_greeting\"}", 3),
            ("step_seconds_count{step=\"replay\"}", 2),
            ("step_seconds_count{step=\"client_handshake\"}", 1),
        ],
    );
    assert_eq!(page.value("plaintext_server_learned"), 1.0);
    let probes = ["same", "changed", "failed"]
        .map(|how| page.value(&format!("plaintext_server_probes_total{{outcome=\"{how}\"}}")));
    assert_eq!(probes, [1.0, 1.0, 0.0]);
    let by_mode = octets(&page);
    assert_eq!(by_mode.map(|modes| modes.iter().sum::<u64>()), logged(&stage.door), "{by_mode:?}");
    // EHLO is 16 octets, STARTTLS 10, QUIT 6, NOOP 6 and MAIL 17.
    assert_eq!(by_mode[0][0], 8 * 16 + 6 * 10 + 5 * 6 + 6 + 17, "{by_mode:?}");
    assert!(by_mode[0][1] > 100 && by_mode[1][1] > 100 && by_mode.iter().all(|modes| modes[2] == 0), "{by_mode:?}");
}

#[test]
fn a_probe_that_fails_is_counted_and_so_is_whom_it_leaves_without_a_server() {
    let address = free_address();
    let place = address.to_string();
    let mut stage = Stage::new(GREETING, &Start { options: &["--lazy", "--metrics", &place], ..Start::USUAL });
    stage.says(CERTAIN);
    stage.greets("printf '554 no\\r\\n'; exit");
    stage.talk(&[("", "220 mx\r\n"), ("MAIL FROM:<a@b>\r\n", "421 4.3.0 Mail server not available\r\n")]);
    let failed = |page: &Page| page.value("plaintext_server_probes_total{outcome=\"failed\"}");
    assert!(wait_until(PATIENCE, || failed(&Page::of(address)) == 1.0), "{:?}", Page::of(address).samples);
    let page = at_rest(address);
    assert_eq!(page.value("sessions_ended_total{reason=\"child_differs\"}"), 1.0);
    assert_eq!((page.value("plaintext_server_learned"), page.value("plaintext_servers_summoned_total")), (1.0, 1.0));
}

#[test]
fn octets_of_raw_and_454_at_once_are_counted_too() {
    let address = free_address();
    let place = address.to_string();
    let start = Start { options: &["--metrics", &place], shape: Shape::Listener, way: Way::Raw, ..Start::USUAL };
    let mut door = Door::open(&start);
    let mut child = Child::accept(&door.puppets).unwrap();
    child.send(b"220 mx\r\n");
    door.backend.listen();
    let client = door.client.as_mut().unwrap();
    client.get(b"220 mx\r\n").unwrap();
    client.send(b"STARTTLS\r\n");
    client.get(STARTTLS.1.as_bytes()).unwrap();
    door.backend.wire().unwrap();
    door.client.as_mut().unwrap().send(&[b'x'; 5000]);
    door.backend.wire().unwrap().get(&[b'x'; 5000]).unwrap();
    door.backend.wire().unwrap().send(b"four");
    door.client.as_mut().unwrap().get(b"four").unwrap();
    // Before its end.
    let expected = [[10, 0, 5000], [8 + STARTTLS.1.len() as u64, 0, 4]];
    assert!(wait_until(PATIENCE, || octets(&Page::of(address)) == expected), "{:?}", octets(&Page::of(address)));
    door.client.as_mut().unwrap().end();
    door.backend.wire().unwrap().end();
    child.exit(0);
    let page = at_rest(address);
    assert_eq!(octets(&page), expected);
    assert_eq!((page.value("starttls_done_total"), page.value("starttls_offered_total")), (1.0, 0.0));

    let address = free_address();
    let place = address.to_string();
    let options = ["--metrics", &place];
    let start = Start { options: &options, shape: Shape::Listener, certificate: false, ..Start::USUAL };
    let mut door = Door::open(&start);
    let mut child = Child::accept(&door.puppets).unwrap();
    child.send(b"220 mx\r\n");
    let client = door.client.as_mut().unwrap();
    client.get(b"220 mx\r\n").unwrap();
    for _ in 0..3 {
        client.send(b"STARTTLS\r\n");
        client.get(NOT_NOW.1.as_bytes()).unwrap();
    }
    assert!(wait_until(PATIENCE, || Page::of(address).value("starttls_asked_total") == 3.0));
    let page = Page::of(address);
    assert_eq!(page.value("starttls_failed_total{step=\"no_certificate\"}"), 3.0);
    assert_eq!(page.value("starttls_offered_total"), 0.0);
    child.exit(0);
}

#[test]
fn two_hundred_sessions_are_seen_while_they_are_there_and_not_after() {
    const MANY: usize = 200;
    let address = free_address();
    let place = address.to_string();
    let options = ["--lazy", "--metrics", &place, "--max-sessions", "200"];
    let mut stage = Stage::new(GREETING, &Start { options: &options, ..Start::USUAL });
    stage.says(CERTAIN);
    let mut clients: Vec<_> = stage.door.client.take().into_iter().collect();
    while clients.len() < MANY {
        next(&mut stage);
        clients.extend(stage.door.client.take());
        if clients.len() % 20 == 0 {
            let now = Page::of(address).sessions();
            assert!((clients.len() as f64..=MANY as f64).contains(&now), "{now} of {}", clients.len());
        }
    }
    let page = Page::of(address);
    assert_eq!((page.value("sessions{state=\"snoop\"}"), page.sessions()), (200.0, 200.0));
    let places = ["sessions_limit", "places_taken", "stress"].map(|name| page.value(name));
    assert_eq!(places, [200.0, 200.0, 1.0]);
    stage.door.connect();
    stage.talk(&[("", "421 4.7.0 Too many sessions, try again later\r\n")]);
    drop(clients);
    let page = at_rest(address);
    assert_eq!(page.value("connections_refused_total{limit=\"sessions\"}"), 1.0);
    assert_eq!(page.value("connections_accepted_total"), 201.0);
    let ended = page.sum("sessions_ended_total");
    assert_eq!((page.value("sessions_begun_total"), ended), (200.0, 200.0));
    assert_eq!(page.value("plaintext_servers_avoided_total"), 200.0);
}

#[test]
fn each_limit_has_a_count_of_its_own() {
    for (limit, options) in [
        ("address", &["--max-per-ip", "1"][..]),
        ("rate", &["--rate-per-ip", "1"]),
        ("proxy", &["--proxy-protocol", "--proxy-from", "192.0.2.0/24"]),
        ("proxy", &["--proxy-protocol", "--proxy-from", "127.0.0.0/8"]),
    ] {
        let address = free_address();
        let place = address.to_string();
        let options = [&["--metrics", &place], options].concat();
        let mut door = Door::open(&Start { options: &options, shape: Shape::Listener, ..Start::USUAL });
        let refused = |page: &Page| page.value(&format!("connections_refused_total{{limit=\"{limit}\"}}"));
        let mut clients = Vec::new();
        let is_counted = wait_until(PATIENCE, || {
            clients.extend(door.client.take());
            door.connect();
            door.client.as_mut().unwrap().send(b"EHLO x\r\n");
            refused(&Page::of(address)) >= 1.0
        });
        assert!(is_counted, "{limit}: {}", door.said());
        let page = Page::of(address);
        let all = page.sum("connections_refused_total");
        assert_eq!(all, refused(&page), "{limit}: and no other");
    }
}

#[test]
fn whoever_asks_badly_is_told_so_and_who_is_slow_holds_up_nobody() {
    let address = free_address();
    let place = address.to_string();
    let mut door = Door::open(&Start { options: &["--metrics", &place], shape: Shape::Listener, ..Start::USUAL });
    let mut child = Child::accept(&door.puppets).unwrap();
    child.send(b"220 mx\r\n");
    door.client.as_mut().unwrap().get(b"220 mx\r\n").unwrap();
    let long = format!("GET /metrics HTTP/1.1\r\nX: {}", "x".repeat(5000));
    let many = format!("GET /metrics HTTP/1.1\r\n{}\r\n", "A: b\r\n".repeat(33));
    for (request, expected) in [
        ("GET /healthz HTTP/1.1\r\n\r\n", "HTTP/1.1 200 OK"),
        ("GET /healthz?x=y HTTP/1.0\r\n\r\n", "HTTP/1.1 200 OK"),
        ("HEAD /metrics HTTP/1.1\r\n\r\n", "HTTP/1.1 200 OK"),
        ("GET / HTTP/1.1\r\n\r\n", "HTTP/1.1 404 Not Found"),
        ("GET /metrics/x HTTP/1.1\r\n\r\n", "HTTP/1.1 404 Not Found"),
        ("POST /metrics HTTP/1.1\r\nContent-Length: 1\r\n\r\n", "HTTP/1.1 405 Method Not Allowed"),
        ("EHLO x\r\n", "HTTP/1.1 400 Bad Request"),
        ("\0\u{1}\u{7f}\r\n\r\n", "HTTP/1.1 400 Bad Request"),
        ("GET /metrics HTTP/9.9\r\n\r\n", "HTTP/1.1 400 Bad Request"),
        (&long, "HTTP/1.1 431 Request Header Fields Too Large"),
        (&many, "HTTP/1.1 431 Request Header Fields Too Large"),
    ] {
        assert_eq!(status(address, request), expected, "{request:?}");
    }
    assert_eq!(ask(address, "HEAD /metrics HTTP/1.1\r\n\r\n").1, "");
    // Those who ask slowly, who never read, and who go: as many as have room leave none for others, but only for a while.
    let slow: Vec<TcpStream> = (0..15)
        .map(|number| {
            let mut socket = TcpStream::connect(address).unwrap();
            socket.write_all(if number % 2 == 0 { b"GET /met" } else { b"" }).unwrap();
            socket
        })
        .collect();
    Page::of(address);
    let more: Vec<TcpStream> = (0..40).map(|_| TcpStream::connect(address).unwrap()).collect();
    drop(more);
    Page::of(address);
    for mut socket in slow {
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        assert_eq!(socket.read_to_end(&mut Vec::new()).ok(), Some(0), "it is cut off without a word");
    }
    // A piece at a time is a request too.
    let mut socket = TcpStream::connect(address).unwrap();
    socket.set_nodelay(true).unwrap();
    for octet in b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n" {
        socket.write_all(&[*octet]).unwrap();
    }
    let mut answer = String::new();
    socket.read_to_string(&mut answer).unwrap();
    assert!(answer.ends_with("\r\n\r\nserving\n"), "{answer}");
    // Nobody else has noticed.
    child.send(b"250 unasked\r\n");
    door.client.as_mut().unwrap().get(b"250 unasked\r\n").unwrap();
    child.exit(0);
}

#[test]
fn health_is_503_from_the_moment_that_nobody_new_is_served() {
    let address = free_address();
    let place = address.to_string();
    let options = ["--metrics", &place, "--drain", "1000"];
    let mut door = Door::open(&Start { options: &options, shape: Shape::Listener, ..Start::USUAL });
    let mut child = Child::accept(&door.puppets).unwrap();
    child.send(b"220 mx\r\n");
    door.client.as_mut().unwrap().get(b"220 mx\r\n").unwrap();
    let health = || status(address, "GET /healthz HTTP/1.1\r\n\r\n");
    assert_eq!(health(), "HTTP/1.1 200 OK");
    door.kill(Signal::TERM);
    assert!(wait_until(PATIENCE, || health() == "HTTP/1.1 503 Service Unavailable"), "{}", health());
    let page = Page::of(address);
    assert_eq!((page.value("draining"), page.sessions()), (1.0, 1.0));
    drop(door.client.take());
    child.exit(0);
    assert_eq!(door.code(), 0);
}

#[test]
fn readme_lists_what_is_served() {
    let address = free_address();
    let place = address.to_string();
    let _door = {
        let door = Door::open(&Start { options: &["--metrics", &place], shape: Shape::Listener, ..Start::USUAL });
        assert!(wait_until(PATIENCE, || door.said().contains("listening on ")), "{}", door.said());
        door
    };
    let readme = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/README.md")).unwrap();
    let table = readme.split_once("<!-- metrics -->\n").unwrap().1.split_once("<!-- /metrics -->").unwrap().0;
    let mut listed = BTreeMap::new();
    for row in table.lines().skip(2) {
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        let labels = cells[3].split(", ").filter(|label| !label.is_empty()).map(str::to_owned).collect();
        listed.insert(cells[1].trim_matches('`').to_owned(), (cells[2].to_owned(), labels));
    }
    assert_eq!(Page::of(address).families, listed);
}

#[test]
fn the_thread_is_in_a_sandbox_of_its_own() {
    let address = free_address();
    let place = address.to_string();
    let door = Door::open(&Start { options: &["--metrics", &place], shape: Shape::Listener, ..Start::USUAL });
    Page::of(address);
    let mut seen = false;
    for task in fs::read_dir(format!("/proc/{}/task", door.pid().as_raw_nonzero())).unwrap() {
        let task = task.unwrap().path();
        if fs::read_to_string(task.join("comm")).unwrap().trim() == "metrics" {
            seen = true;
            let status = fs::read_to_string(task.join("status")).unwrap();
            assert!(status.contains("Seccomp:\t2\n") && status.contains("NoNewPrivs:\t1\n"), "{status}");
        }
    }
    assert!(seen, "no thread is called so");
}

#[test]
fn an_address_that_can_t_be_had_is_said_before_anybody_is_served() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let place = taken.local_addr().unwrap().to_string();
    let program = env!("CARGO_BIN_EXE_starttls-wrapper");
    for (words, code, said) in [
        (
            format!("--listen {} --metrics {place} --way keep p", free_address()),
            111,
            format!("can't listen on {place}"),
        ),
        ("--metrics 127.0.0.1:9125 --way keep p".to_owned(), 100, "--metrics is a listener's".to_owned()),
        ("--listen 127.0.0.1:25 --metrics 9125 --way keep p".to_owned(), 100, "--metrics wants ADDR:PORT".to_owned()),
        (
            "--listen 127.0.0.1:25 --metrics [::1]:0 --way keep p".to_owned(),
            100,
            "--metrics wants ADDR:PORT".to_owned(),
        ),
        (
            "--listen 127.0.0.1:25 --metrics 127.0.0.1:25 --way keep p".to_owned(),
            100,
            "--listen and --metrics can't both have 127.0.0.1:25".to_owned(),
        ),
    ] {
        let out = Command::new(program).args(words.split(' ')).env_clear().output().unwrap();
        let stderr = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(code), "{words}: {stderr}");
        assert!(stderr.contains(&said) && !stderr.contains("listening"), "{words}: {stderr}");
    }
}
