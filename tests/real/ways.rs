//! The other ways to the server behind TLS, between real clients and real servers.
//!
//! By TLS and in the clear the same mailfront may take the letters, so here the queue does not show which way one went: the
//! summary lines do.

use std::ffi::OsString;
use std::net::SocketAddrV4;

use crate::backends::{stunnel_before, tlswrapper};
use crate::clients::{Mode, curl, openssl, silent_tls, swaks};
use crate::front::{Identity, MAILFRONT, sessions_ended_well, tcpserver, wrapper_by};
use crate::letter::{Queue, letter, long_letter};
use crate::proxy::haproxy;
use crate::stage::Stage;

/// Where TLS sessions go on.
pub(crate) struct Behind {
    /// HOST and PORT, behind the options that it needs.
    server: Vec<String>,
    pub(crate) queue: Queue,
}

/// Nowhere else: PROG takes all.
fn prog(stage: &Stage, _: &Identity) -> Behind {
    Behind { server: Vec::new(), queue: Queue::new(stage, "child") }
}

/// A mailfront under tcpserver, in the clear.
fn on_loopback(stage: &Stage, _: &Identity) -> Behind {
    let queue = Queue::new(stage, "backend");
    let at = tcpserver(stage, "backend", &MAILFRONT.map(Into::into), &queue);
    Behind { server: vec![at.ip().to_string(), at.port().to_string()], queue }
}

/// A mailfront on a UNIX socket, in the clear.
fn on_a_unix_socket(stage: &Stage, _: &Identity) -> Behind {
    let (queue, path) = (Queue::new(stage, "backend"), stage.path("smtp.socket"));
    let mut command = stage.command(["systemd-socket-activate", "--accept", "--inetd", "-E", "QUEUEDIR", "-E", "PATH"]);
    command.arg("-l").arg(&path).args(MAILFRONT).env("QUEUEDIR", queue.folder());
    stage.start_until("backend", &mut command, "listen on its socket", || path.exists());
    Behind { server: vec![format!("unix:{}", path.display())], queue }
}

pub(crate) struct Way {
    pub(crate) name: &'static str,
    behind: fn(&Stage, &Identity) -> Behind,
}

impl Way {
    /// Its TLS is tlswrapper's, which knows no newer than 1.2.
    fn is_old(&self) -> bool {
        std::ptr::fn_addr_eq(self.behind, behind_tlswrapper as fn(&Stage, &Identity) -> Behind)
    }

    /// The versions that it knows.
    pub(crate) fn modes(&self) -> &'static [Mode] {
        if self.is_old() { &[Mode::Tls12] } else { &[Mode::Tls12, Mode::Tls13] }
    }
}

/// A mailfront behind somebody's TLS, muted.
const MUTED: [&str; 6] =
    [env!("CARGO_BIN_EXE_starttls-wrapper"), "--mute=always", "mailfront", "smtp", "queuedir", "accept"];

fn behind_stunnel(stage: &Stage, identity: &Identity) -> Behind {
    let queue = Queue::new(stage, "backend");
    let server = format!("exec = {}\nexecArgs = {}", MUTED[0], MUTED.join(" "));
    let at = stunnel_before(stage, identity, "TLSv1.3", &server, &queue);
    Behind { server: vec![at.ip().to_string(), at.port().to_string()], queue }
}

/// It knows TLS 1.2 only.
fn behind_tlswrapper(stage: &Stage, identity: &Identity) -> Behind {
    let queue = Queue::new(stage, "backend");
    let at = tlswrapper(stage, identity, &MUTED, &queue);
    Behind { server: vec![at.ip().to_string(), at.port().to_string()], queue }
}

/// A mailfront behind HAProxy, which waits for the header until the client's TLS stands.
fn told_late(stage: &Stage, bind: &str) -> Behind {
    let queue = Queue::new(stage, "backend");
    let mailfront = tcpserver(stage, "backend", &MAILFRONT.map(Into::into), &queue);
    let at = haproxy(stage, mailfront, bind);
    let options = ["--send-proxy", "v2", "--proxy-facts", "late"].map(str::to_owned);
    Behind { server: [&options[..], &[at.ip().to_string(), at.port().to_string()]].concat(), queue }
}

fn told_late_in_tls(stage: &Stage, identity: &Identity) -> Behind {
    let read = |path| std::fs::read(path).expect("certificate and key");
    let both = stage.write("both.pem", [read(&identity.certificate), read(&identity.key)].concat());
    told_late(stage, &format!("ssl crt {}", both.display()))
}

fn told_late_in_clear(stage: &Stage, _: &Identity) -> Behind {
    told_late(stage, "")
}

pub(crate) const WAYS: [Way; 10] = [
    Way { name: "keep", behind: prog },
    Way { name: "respawn", behind: prog },
    Way { name: "ucspi-tls", behind: prog },
    Way { name: "ucspi-tls-respawn", behind: prog },
    Way { name: "plain", behind: on_loopback },
    Way { name: "plain", behind: on_a_unix_socket },
    Way { name: "tls", behind: told_late_in_tls },
    Way { name: "plain", behind: told_late_in_clear },
    Way { name: "raw", behind: behind_stunnel },
    Way { name: "raw", behind: behind_tlswrapper },
];

/// A front that goes this way; what is behind TLS; and PROG's queue where that is another one.
pub(crate) fn front(stage: &Stage, way: &Way) -> (Identity, SocketAddrV4, Behind, Option<Queue>) {
    let identity = Identity::self_signed(stage, "own");
    let behind = (way.behind)(stage, &identity);
    let child = (!behind.server.is_empty()).then(|| Queue::new(stage, "child"));
    let mut argv = wrapper_by(&identity, way.name, &behind.server, &MAILFRONT);
    if way.name.starts_with("ucspi-tls") {
        let server = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/hostile/ucspi_tls_server.py");
        let mut through: Vec<OsString> = ["/usr/bin/python3", "-I", server, "serve"].map(Into::into).into();
        through.extend([identity.certificate.clone().into(), identity.key.clone().into()]);
        argv.splice(0..0, through);
    }
    let at = tcpserver(stage, "front", &argv, child.as_ref().unwrap_or(&behind.queue));
    (identity, at, behind, child)
}

/// How many sessions went through TLS.
fn through_tls(stage: &Stage) -> usize {
    stage
        .log("front")
        .lines()
        .filter(|line| line.contains(" mode=tls tls=TLSv1.") || line.contains(" mode=raw "))
        .count()
}

#[test]
fn each_way_takes_letters_of_real_clients_through_tls_and_in_clear() {
    for way in &WAYS {
        for (client, name) in [(swaks as fn(&_, _, _, &_, &[u8]), "swaks"), (openssl, "openssl")] {
            for &mode in way.modes() {
                let stage = Stage::new();
                let (identity, at, behind, child) = front(&stage, way);
                let text = letter(name);
                client(&stage, at, mode, &identity, &text);
                behind.queue.holds(&text);
                if let Some(child) = &child {
                    child.is_empty();
                }
                sessions_ended_well(&stage);
                assert_eq!(through_tls(&stage), 1, "{}: {}", way.name, stage.log("front"));
            }
        }
        let stage = Stage::new();
        let (identity, at, behind, child) = front(&stage, way);
        let text = letter("in-clear");
        swaks(&stage, at, Mode::Clear, &identity, &text);
        child.as_ref().unwrap_or(&behind.queue).holds(&text);
        sessions_ended_well(&stage);
        assert_eq!(through_tls(&stage), 0, "{}: {}", way.name, stage.log("front"));
    }
}

#[test]
fn each_way_takes_a_letter_of_many_megabytes_whole() {
    for way in &WAYS {
        let stage = Stage::new();
        let (identity, at, behind, _child) = front(&stage, way);
        let long = long_letter("long", 8 << 20);
        curl(&stage, at, if way.is_old() { Mode::Tls12 } else { Mode::Tls13 }, &identity, &long);
        behind.queue.holds(&long);
        sessions_ended_well(&stage);
    }
}

/// Nothing is said inside TLS before the client speaks, and nothing but HELO opens the gate.
#[test]
fn each_way_is_silent_inside_tls_until_the_client_speaks() {
    for way in &WAYS {
        let stage = Stage::new();
        let (_identity, at, _behind, _child) = front(&stage, way);
        silent_tls(&stage, at);
    }
}
