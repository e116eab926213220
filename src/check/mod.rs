//! `--check`: the whole set-up tried without a client, by the parts that a session is made of, and told as a table.
//!
//! Contract: the order and the ids are a session's. PROG runs with the ids that we were started with; certificate, key and roots are
//! opened with them; then TLS_UID and TLS_GID are taken on, then the sandbox, and only then HOST is heard. Nothing is ever mailed:
//! MAIL and RCPT are taken back by RSET. Every wait has the time-out that it has in a session, and every child is reaped. What can't
//! be seen from here, or hangs on something that failed, is `untried`, and never `ok`.
//!
//! | file | what it asks |
//! |---|---|
//! | `host`, `reach` | is HOST reached, believed, and does it take clients |
//! | `prog` | does PROG greet, what does it offer, will it go on behind TLS |
//! | `certificate` | is ours usable, and would strangers believe it |
//! | `relaying` | whether a server takes mail for others |
//! | `talk` | nothing: a dialogue, blocking, every wait with an end |
//! | `table` | nothing: what was found, and what to do about it |

mod certificate;
mod host;
mod prog;
mod reach;
mod relaying;
mod table;

use std::io::IsTerminal;

use crate::cli::{Config, IdentitySource, Mute};
use crate::driver::{needs, ucspi};
use crate::engine::Peer;
use crate::error::{Fatal, exit};
use crate::session::Way;
use crate::sys::sandbox::{self, Confined};
use crate::sys::{inherited, privileges};
use crate::tls::{Identity, Roots, server_name};

use host::Host;
use prog::Known;
use reach::Road;
use table::Table;

/// The name in our EHLO, one that exists and is nobody's (RFC 2606): servers that look it up find it.
const HELLO: &str = "example.net";

/// Tries everything and prints the table. Returns the exit code: 1 if there is a problem.
///
/// # Errors
/// It can't begin, or the table can't be written.
pub fn run(config: &Config) -> Result<u8, Fatal> {
    inherited::clean_up().map_err(|error| Fatal::System("prepare the inherited descriptors", error))?;
    let stdout = std::io::stdout();
    let is_coloured = stdout.is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let mut table = Table::new(Box::new(stdout), is_coloured);
    let known = prog::check(config, &mut table);
    say_way(config, &mut table);
    let name = known.as_ref().and_then(|known| known.name.as_deref());
    let identity = if config.policy.way.ends_tls() { certificate::check(config, name, &mut table) } else { None };
    if config.policy.way.dials() {
        check_host(config, identity.as_ref(), known, &mut table).map_err(|error| Fatal::System("try HOST", error))?;
    } else {
        become_less(config, &mut table);
    }
    let problems = table.end().map_err(|error| Fatal::System("write the table", error))?;
    Ok(if problems > 0 { exit::CLIENT } else { exit::OVER })
}

/// HOST, with the ids and the rights that a session has left.
fn check_host(
    config: &Config,
    identity: Option<&Identity>,
    known: Option<Known>,
    table: &mut Table,
) -> std::io::Result<()> {
    let Some(target) = ucspi::target(config) else { return Ok(()) };
    let own_leaf = identity.map(|identity| identity.leaf().clone());
    let peer = match config.policy.way {
        // Which certificate HOST shows is for clients to judge, who know it by another name anyway: where HOST can be none for TLS,
        // one that can will do.
        Way::Raw => {
            let host = target.place.to_string();
            let name = if server_name(&host).is_ok() { host } else { HELLO.to_owned() };
            Some(Peer { roots: Roots::default(), name, insecure: true })
        }
        _ => ucspi::peer(config),
    };
    let tls = match peer.as_ref().map(|peer| peer.set_up(own_leaf.clone())).transpose() {
        Ok(tls) => tls,
        Err(error) => {
            table.problem(
                reach::TLS,
                &error.to_string(),
                "HOST must be a name or an address that a certificate can bear.",
            );
            return Ok(());
        }
    };
    let road = Road::new(config, target.clone(), tls)?;
    become_less(config, table);
    if config.sandbox {
        match sandbox::confine(&needs::of_a_session(Some(&target), peer.as_ref(), Vec::new())) {
            Confined::Wholly | Confined::OlderLandlock => table.ok("sandbox", "what follows was tried inside it"),
            Confined::Without(what) => {
                table.warning("sandbox", &format!("without {what}"), "This kernel or container has not all of it.");
            }
        }
    }
    let hello = known.and_then(|known| known.hello);
    Host { config, road, hello, own_leaf }.check(table);
    Ok(())
}

/// Takes on TLS_UID and TLS_GID.
fn become_less(config: &Config, table: &mut Table) {
    let who = |id: Option<u32>, name: &str| id.map(|id| format!("{name}={id}"));
    let (uid, gid) = ucspi::ids(config);
    let ids: Vec<String> = [who(uid, "TLS_UID"), who(gid, "TLS_GID")].into_iter().flatten().collect();
    let before = rustix::process::geteuid().as_raw();
    match privileges::become_user(uid, gid).and_then(|()| privileges::harden()) {
        Ok(()) if ids.is_empty() => {}
        Ok(()) => table.ok("ids", &format!("PROG ran and the key was read as uid {before}; then {}", ids.join(", "))),
        Err(error) => table.problem(
            "ids",
            &format!("uid {before} can't drop its privileges ({}): {error}", ids.join(", ")),
            "Each session would end so: TLS_UID and TLS_GID are for root. What follows was tried as before.",
        ),
    }
}

/// What a way has that can't be seen from here.
fn say_way(config: &Config, table: &mut Table) {
    match config.policy.way {
        Way::UcspiTls | Way::UcspiRespawn => {
            table.untried(
                "TLS",
                "it is the UCSPI-TLS server's",
                "Certificate and key: see what that server logs, or ask it by a client.",
            );
        }
        Way::Mute => {
            let whose = match &config.mute {
                Some(Mute::Ports(ports)) => {
                    let ports: Vec<String> = ports.iter().map(u16::to_string).collect();
                    format!("of those whose TCPLOCALPORT is {}", ports.join(" or "))
                }
                Some(Mute::Always) | None => "of all".to_owned(),
            };
            table.ok("greeting", &format!("swallowed, {whose}"));
            table.untried("TLS", "it is done before us", "Try --check with --way raw: it sees both.");
        }
        Way::Tls | Way::Plain | Way::TlsLate | Way::PlainLate | Way::Keep | Way::Respawn | Way::Raw => {}
    }
    if config.identity == IdentitySource::None && config.policy.way.ends_tls() && config.policy.require_tls {
        table.problem("--require-tls", "without a certificate", "Nobody is served: name one.");
    }
}
