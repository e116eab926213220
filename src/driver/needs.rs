//! What a door keeps of our rights once its clients are heard: [`Needs`] by what was typed, and not a right more.

use log::{debug, info};
use rustix::process::Pid;

use crate::engine::Peer;
use crate::sys::dial::Target;
use crate::sys::sandbox::{Confined, Needs, system_roots};

/// Where nothing is given up.
pub(super) const OFF: &str = "sandbox: off (--no-sandbox)";

/// One session, which is led to `target`, known as `peer`, and has started `children`.
#[must_use]
pub fn of_a_session(target: Option<&Target>, peer: Option<&Peer>, children: Vec<Pid>) -> Needs {
    let folders = peer.map_or(&[][..], |peer| peer.roots.folders());
    // A folder may be one of the system's, or of links to its certificates.
    let linked = folders.first().map(|_| system_roots()).unwrap_or_default();
    let files = folders.iter().cloned().chain(linked).collect();
    Needs { children, targets: target.cloned().into_iter().collect(), files, listens: false, peeks: false }
}

/// The loops of a listener and all their sessions, which begin with `plain` where that is a daemon; `peeks`: proxies say who their
/// clients are. What is started for them is a spawner's.
#[must_use]
pub fn of_a_listener(target: Option<&Target>, plain: Option<&Target>, peer: Option<&Peer>, peeks: bool) -> Needs {
    let sessions = of_a_session(target, peer, Vec::new());
    let targets = target.into_iter().chain(plain).cloned().collect();
    Needs { targets, listens: true, peeks, ..sessions }
}

/// The thread that tells figures.
#[must_use]
pub(super) fn of_who_is_asked() -> Needs {
    Needs { listens: true, ..Needs::default() }
}

/// What became of the rest of our rights, for the log.
pub(super) fn say(confined: &Confined) {
    match confined {
        Confined::Wholly => debug!("sandbox: Landlock and seccomp"),
        Confined::OlderLandlock => debug!("sandbox: Landlock, as far as this kernel has it, and seccomp"),
        Confined::Without(what) => info!("sandbox: without {what}"),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::cli::{Config, Invocation, read};
    use crate::driver::ucspi::{peer, target};
    use crate::session::Way;
    use crate::sys::dial::Place;

    /// A command line of each way that has one. PROG waits for the end of its input.
    pub(in crate::driver) const LINES: [(Way, &str); 10] = [
        (Way::Tls, "192.0.2.1 465 cat"),
        (Way::TlsLate, "--send-proxy v2 --proxy-facts late 192.0.2.1 465 cat"),
        (Way::Plain, "--way plain --trusted-loopback 127.0.0.1 465 cat"),
        (Way::PlainLate, "--way plain --send-proxy v2 --proxy-facts late 127.0.0.1 465 cat"),
        (Way::Raw, "--way raw 192.0.2.1 465 cat"),
        (Way::Keep, "--way keep cat"),
        (Way::Respawn, "--way respawn cat"),
        (Way::UcspiTls, "--way ucspi-tls cat"),
        (Way::UcspiRespawn, "--way ucspi-tls-respawn cat"),
        (Way::Mute, "--mute cat"),
    ];

    pub(in crate::driver) fn config(line: &str, variables: &[(&str, &str)]) -> Config {
        let environment =
            |name: &str| variables.iter().find(|(known, _)| *known == name).map(|(_, value)| value.into());
        match read(line.split_whitespace().map(Into::into), environment) {
            Ok(Invocation::Serve(config)) => *config,
            other => panic!("{line}: {other:?}"),
        }
    }

    /// Where each may be dialled.
    fn places(needs: &Needs) -> Vec<String> {
        let port = |place: &Place| match place {
            Place::Tcp(_, port) => format!(":{port}"),
            Place::Found(..) | Place::Unix(_) => String::new(),
        };
        needs.targets.iter().map(|target| format!("{}{}", target.place, port(&target.place))).collect()
    }

    fn session(config: &Config) -> Needs {
        of_a_session(target(config).as_ref(), peer(config).as_ref(), vec![Pid::INIT])
    }

    #[test]
    fn a_session_is_left_host_where_it_has_one_and_no_file() {
        for (way, line) in LINES {
            let config = config(line, &[("CAFILE", "/dev/null")]);
            assert_eq!(config.policy.way, way);
            let needs = session(&config);
            let host = line.split(' ').find(|word| word.starts_with("1")).map(|host| format!("{host}:465"));
            assert_eq!(places(&needs), host.into_iter().collect::<Vec<_>>(), "{line}");
            assert_eq!(needs.targets.len(), usize::from(way.dials()), "{line}");
            assert_eq!(needs.files, Vec::<PathBuf>::new(), "{line}");
            assert_eq!((needs.listens, needs.peeks), (false, false), "{line}");
            assert_eq!(needs.children, [Pid::INIT], "{line}");
        }
        let socket = session(&config("--way plain --trusted-loopback unix:/run/smtp cat", &[]));
        assert_eq!((places(&socket), socket.files), (vec!["/run/smtp".to_owned()], vec![]));
    }

    #[test]
    fn a_folder_of_roots_is_read_with_the_systems_where_host_is_asked_for_its_certificate() {
        for (way, line) in LINES.into_iter().filter(|(way, _)| way.dials()) {
            let needs = session(&config(line, &[("CADIR", "/etc/roots")]));
            let expected =
                if way.secures_host() { [vec!["/etc/roots".into()], system_roots()].concat() } else { vec![] };
            assert_eq!(needs.files, expected, "{line}");
        }
        let insecure = session(&config("--backend-insecure localhost 465 cat", &[("CADIR", "/etc/roots")]));
        assert_eq!(insecure.files, Vec::<PathBuf>::new());
    }

    #[test]
    fn a_listener_is_left_its_plain_daemon_besides_and_no_child() {
        let daemon = Target { place: Place::Tcp("127.0.0.1".to_owned(), 2525), source: None, loopback_only: false };
        for (_, line) in LINES {
            let config = config(line, &[("CAFILE", "/dev/null")]);
            let (target, peer) = (target(&config), peer(&config));
            let own = session(&config);
            for (plain, peeks) in [(None, false), (None, true), (Some(&daemon), false)] {
                let needs = of_a_listener(target.as_ref(), plain, peer.as_ref(), peeks);
                let daemon = plain.map(|_| "127.0.0.1:2525".to_owned());
                assert_eq!(places(&needs), places(&own).into_iter().chain(daemon).collect::<Vec<_>>(), "{line}");
                assert_eq!((needs.children, needs.files), (vec![], vec![]), "{line}");
                assert_eq!((needs.listens, needs.peeks), (true, peeks), "{line}");
            }
        }
        let figures = of_who_is_asked();
        assert!(figures.children.is_empty() && figures.targets.is_empty() && figures.files.is_empty());
        assert!(figures.listens && !figures.peeks);
    }
}
