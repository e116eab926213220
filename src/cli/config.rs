//! What we run with: every value checked, every contradiction refused, nothing changed afterwards.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use core::str::FromStr;
use core::time::Duration;
use std::ffi::{OsStr, OsString};
use std::path::PathBuf;

use log::LevelFilter;

use super::args::{self, Typed, socket_path};
use super::cutoff::cutoff;
use super::listen::{Listen, listen, plain};
use super::mute::{Mute, mute, told};
use super::options::{Id, OPTIONS};
use crate::error::Fatal;
use crate::proxy::Version;
use crate::session::Way;
use crate::session::limits;
use crate::session::policy::{Cutoff, Policy, RelayMode, Replay, Timeouts};
use crate::tls::server_name;

/// A checked command line.
#[derive(Debug)]
pub struct Config {
    /// HOST PORT, where the way has one.
    pub server: Option<Server>,
    /// `--listen`: no UCSPI child, but many sessions.
    pub listen: Option<Listen>,
    /// The plaintext server, if it is a daemon and not PROG.
    pub plain: Option<Server>,
    /// `--mute`: whose greeting is swallowed.
    pub mute: Option<Mute>,
    /// PROG, found through PATH.
    pub program: OsString,
    /// ARGS.
    pub arguments: Vec<OsString>,
    /// Who we are to the client.
    pub identity: IdentitySource,
    /// The file of keys for session tickets; only with a certificate of a file.
    pub ticket_keys: Option<PathBuf>,
    /// Certificates that the backend is checked against.
    pub ca_file: Option<PathBuf>,
    /// A directory of them; from CADIR, which a typed `--backend-ca` puts out of force.
    pub ca_dir: Option<PathBuf>,
    /// The name that the backend's certificate must bear; `None`: HOST.
    pub backend_name: Option<String>,
    /// What PROG says to everybody; a UCSPI child puts it off then.
    pub greeting: Option<PathBuf>,
    /// Don't check the backend's certificate. HOST is then `localhost` or a loopback literal, as it is in the way `plain`;
    /// what `localhost` resolves to is for the dialler to check.
    pub backend_insecure: bool,
    /// Local address to connect from; of the family of HOST where HOST is a literal.
    pub backend_source: Option<IpAddr>,
    /// Tell HOST who the client is, by a PROXY header of this version.
    pub send_proxy: Option<Version>,
    /// HOST is on this host, takes every client for it, and nobody has said that this is meant: an open relay, if it trusts
    /// loopback.
    pub may_relay_for_all: bool,
    /// The same of the daemon in PROG's place, which is told of no client by any means.
    pub may_relay_in_clear: bool,
    /// What the session decides by. `offer_tls` says only that an identity was named: loading it may yet fail.
    pub policy: Policy,
    /// How relayed plaintext moves.
    pub relay: RelayMode,
    /// What is said on stderr where RUST_LOG doesn't say otherwise.
    pub verbosity: LevelFilter,
    /// The user to become once the key is read; neither 0 nor -1.
    pub uid: Option<u32>,
    /// The group to become once the key is read; neither 0 nor -1.
    pub gid: Option<u32>,
    /// Whether we give up what we will not need before we read the client.
    pub sandbox: bool,
}

/// HOST PORT.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Server {
    /// Over TCP.
    Tcp {
        /// A name or an address literal, not yet resolved.
        host: String,
        /// Never 0.
        port: u16,
    },
    /// A UNIX socket: `unix:PATH`.
    Unix(PathBuf),
}

impl Server {
    /// HOST, where it is one of TCP's.
    fn host(&self) -> Option<&str> {
        match self {
            Self::Tcp { host, .. } => Some(host),
            Self::Unix(_) => None,
        }
    }
}

/// Where certificate and key come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum IdentitySource {
    /// There is none: STARTTLS is not offered.
    None,
    /// Two PEM files, or one that holds both.
    Files {
        /// The certificate chain, leaf first.
        cert: PathBuf,
        /// The private key.
        key: PathBuf,
    },
    /// A certificate for this name, made in memory and gone with the process.
    SelfSigned(String),
}

impl Config {
    /// Checks what was typed.
    ///
    /// # Errors
    /// [`Fatal::Usage`] names the first thing that can't be right.
    pub fn check(typed: Typed) -> Result<Self, Fatal> {
        refuse_idle(&typed)?;
        let server = server(&typed)?;
        let host = server.as_ref().and_then(Server::host);
        // Where the TLS is somebody else's, so may be what the environment says of a certificate.
        let identity = if typed.way.ends_tls() { identity(&typed)? } else { IdentitySource::None };
        let send_proxy = chosen(&typed, Id::SendProxy, &[("v1", Some(Version::V1)), ("v2", Some(Version::V2))])?;
        let way = way(&typed, send_proxy)?;
        let policy = policy(&typed, way, identity != IdentitySource::None || !typed.way.ends_tls())?;
        let backend_source = backend_source(&typed, host)?;
        // From these two everybody on this host comes.
        let usual = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
        let is_apart = backend_source.is_some_and(|source| !usual.contains(&source.to_canonical()));
        let is_trusted = typed.times(Id::TrustedLoopback) > 0;
        let is_told = send_proxy.is_some() || is_apart || is_trusted;
        let plain = plain(&typed)?;
        let has_local_daemon = plain.as_ref().is_some_and(|daemon| daemon.host().is_none_or(is_local));
        // Where TLS is required it hears of mail only by the way on which it goes on behind TLS.
        let may_mail = !policy.require_tls || way.keeps();
        Ok(Self {
            greeting: typed.value(Id::Greeting).map(PathBuf::from),
            ticket_keys: ticket_keys(&typed, &identity)?,
            identity,
            ca_file: typed.value(Id::BackendCa).map(PathBuf::from),
            // A typed trust anchor is not widened by what happens to be in the environment.
            ca_dir: typed.value(Id::CaDir).filter(|_| typed.times(Id::BackendCa) == 0).map(PathBuf::from),
            backend_name: backend_name(&typed)?,
            backend_insecure: backend_insecure(&typed, host)?,
            backend_source,
            send_proxy,
            may_relay_for_all: !is_told && server.is_some() && host.is_none_or(is_local),
            may_relay_in_clear: !is_trusted && has_local_daemon && may_mail,
            policy,
            relay: chosen(&typed, Id::Relay, &[("splice", RelayMode::Splice), ("copy", RelayMode::Copy)])?,
            verbosity: verbosity(typed.times(Id::Verbose), typed.times(Id::Quiet)),
            uid: unprivileged(&typed, Id::TlsUid)?,
            gid: unprivileged(&typed, Id::TlsGid)?,
            listen: listen(&typed)?,
            plain,
            mute: mute(&typed)?,
            sandbox: typed.times(Id::NoSandbox) == 0,
            server,
            program: if typed.value(Id::Plain).is_some() { typed.program } else { program(typed.program)? },
            arguments: typed.arguments,
        })
    }
}

pub(super) fn usage<T>(what: String) -> Result<T, Fatal> {
    Err(Fatal::Usage(what))
}

pub(super) fn called(id: Id) -> String {
    OPTIONS[id as usize].called()
}

/// Options that say nothing in this way. Variables may stand: an environment serves many programs.
fn refuse_idle(typed: &Typed) -> Result<(), Fatal> {
    // What is about TLS with HOST, and what is about HOST at all.
    let tls = [Id::BackendCa, Id::BackendName, Id::BackendInsecure, Id::BackendHandshakeTimeout];
    let host = [
        Id::BackendSource,
        Id::SendProxy,
        Id::ProxyFacts,
        Id::TrustedLoopback,
        Id::DialTimeout,
        Id::Replay,
        Id::GreetingTimeout,
    ];
    // What is about our certificate and TLS with the client, and what about the dialogue before it.
    let own = [Id::Cert, Id::Key, Id::SelfSigned, Id::TicketKeys, Id::HandshakeTimeout];
    let snoop = [Id::RequireTls, Id::Refusals, Id::MaxStarttls, Id::Cutoff];
    let idle = match typed.way {
        Way::Tls | Way::TlsLate => Vec::new(),
        Way::Plain | Way::PlainLate => tls.to_vec(),
        Way::Keep => [&tls[..], &host].concat(),
        Way::Respawn => [&tls[..], &host[..5]].concat(),
        Way::UcspiTls => [&own[..4], &tls, &host].concat(),
        Way::UcspiRespawn => [&own[..4], &tls, &host[..5]].concat(),
        Way::Raw => [&own[..], &tls, &[Id::ProxyFacts, Id::Replay, Id::GreetingTimeout, Id::ReplayTimeout]].concat(),
        Way::Mute => [&own[..], &tls, &snoop, &host[..6], &[Id::Greeting]].concat(),
    };
    // Whatever the way: a daemon in PROG's place may be on loopback, and who is started when a client needs it has its time to come and greet.
    let is_late = typed.times(Id::Listen) + typed.times(Id::Greeting) > 0;
    let is_about_prog = |id: Id| match id {
        Id::TrustedLoopback => typed.times(Id::Plain) > 0,
        Id::DialTimeout | Id::GreetingTimeout => is_late,
        _ => false,
    };
    match idle.iter().find(|id| typed.times(**id) > 0 && !is_about_prog(**id)) {
        Some(id) => usage(format!("{} says nothing with {}", called(*id), args::called(typed.way))),
        None => Ok(()),
    }
}

fn server(typed: &Typed) -> Result<Option<Server>, Fatal> {
    match (&typed.host, &typed.port) {
        (None, _) => Ok(None),
        (Some(word), Some(port_word)) => {
            let (host, port) = (host(word)?, port(port_word)?);
            // The client was promised TLS: no octet of it goes in the clear over a network.
            if typed.way == Way::Plain && !is_local(&host) {
                return usage(format!(
                    "--way plain is only for localhost, a loopback address or unix:PATH, not {host}"
                ));
            }
            Ok(Some(Server::Tcp { host, port }))
        }
        (Some(word), None) => match socket_path(word) {
            _ if typed.way != Way::Plain => usage("unix:PATH is only for --way plain".to_owned()),
            Some(path) if !path.is_empty() => Ok(Some(Server::Unix(PathBuf::from(path)))),
            Some(_) | None => usage("unix: wants a path".to_owned()),
        },
    }
}

fn host(word: &OsStr) -> Result<String, Fatal> {
    match word.to_str() {
        Some(host) if !host.is_empty() && host.bytes().all(|octet| octet.is_ascii_graphic()) => Ok(host.to_owned()),
        _ => usage(format!("HOST must be a host name or an address, not {word:?}")),
    }
}

fn backend_name(typed: &Typed) -> Result<Option<String>, Fatal> {
    match text(typed, Id::BackendName)? {
        Some(name) if server_name(name).is_err() => {
            usage(format!("--backend-name: {name:?} is neither a DNS name nor an address"))
        }
        name => Ok(name.map(str::to_owned)),
    }
}

fn port(word: &OsStr) -> Result<u16, Fatal> {
    match word.to_str().and_then(parsed) {
        Some(port) if port > 0 => Ok(port),
        _ => usage(format!(
            "PORT must be a number from 1 to 65535, not {word:?}; options stand before HOST, --way says what else"
        )),
    }
}

pub(super) fn program(word: OsString) -> Result<OsString, Fatal> {
    if word.is_empty() { usage("PROG must be a program, not nothing".to_owned()) } else { Ok(word) }
}

fn identity(typed: &Typed) -> Result<IdentitySource, Fatal> {
    if let Some(name) = text(typed, Id::SelfSigned)? {
        return match [Id::Cert, Id::Key].into_iter().find(|&id| typed.times(id) > 0) {
            Some(id) => usage(format!("--self-signed makes its own certificate and key: leave out {}", called(id))),
            None => Ok(IdentitySource::SelfSigned(name.to_owned())),
        };
    }
    match (typed.value(Id::Cert), typed.value(Id::Key)) {
        (Some(cert), key) => {
            Ok(IdentitySource::Files { cert: PathBuf::from(cert), key: PathBuf::from(key.unwrap_or(cert)) })
        }
        (None, Some(_)) => usage("a key without a certificate: --cert (or CERTFILE) is missing".to_owned()),
        (None, None) => Ok(IdentitySource::None),
    }
}

fn ticket_keys(typed: &Typed, identity: &IdentitySource) -> Result<Option<PathBuf>, Fatal> {
    match (typed.value(Id::TicketKeys), identity) {
        (None, _) => Ok(None),
        (Some(path), IdentitySource::Files { .. }) => Ok(Some(path.into())),
        (Some(_), IdentitySource::None) => {
            usage("--ticket-keys: there is no TLS without a certificate (--cert)".to_owned())
        }
        (Some(_), IdentitySource::SelfSigned(_)) => usage(
            "--self-signed makes another certificate each time, for which no ticket counts: leave out --ticket-keys"
                .to_owned(),
        ),
    }
}

/// The way as it goes with `--proxy-facts`. A header of version 1 has no room for what comes late.
fn way(typed: &Typed, send_proxy: Option<Version>) -> Result<Way, Fatal> {
    let is_late = chosen(typed, Id::ProxyFacts, &[("early", false), ("late", true)])?;
    if typed.times(Id::ProxyFacts) > 0 && send_proxy != Some(Version::V2) {
        return usage("--proxy-facts counts only with --send-proxy v2".to_owned());
    }
    Ok(typed.way.late().filter(|_| is_late).unwrap_or(typed.way))
}

fn policy(typed: &Typed, way: Way, offer_tls: bool) -> Result<Policy, Fatal> {
    let require_tls = typed.times(Id::RequireTls) > 0;
    if typed.times(Id::Refusals) > 0 && !require_tls {
        return usage("--refusals counts only with --require-tls".to_owned());
    }
    // Under a UCSPI server PROG's own limits stand, and nothing but them.
    let listener = |limit| (!typed.listen.is_empty()).then_some(limit);
    let replays = [("hello", Replay::Hello), ("all", Replay::All), ("none", Replay::None)];
    Ok(Policy {
        offer_tls,
        require_tls,
        refusals: number(typed, Id::Refusals)?.unwrap_or(Policy::default().refusals),
        max_errors: number(typed, Id::MaxErrors)?.or(listener(limits::LISTENER_ERRORS)),
        max_starttls: number(typed, Id::MaxStarttls)?.or(listener(limits::LISTENER_STARTTLS)),
        cutoff: match text(typed, Id::Cutoff)? {
            Some(list) => cutoff(list)?,
            None => Cutoff::default(),
        },
        way,
        replay: match way {
            // A child that is kept is told RSET; what goes on untouched, nothing.
            Way::Keep | Way::UcspiTls | Way::Raw => Replay::None,
            Way::Mute => Replay::All,
            Way::Tls | Way::Plain | Way::Respawn | Way::TlsLate | Way::PlainLate | Way::UcspiRespawn => {
                chosen(typed, Id::Replay, &replays)?
            }
        },
        told: if way == Way::Mute { told(typed)? } else { Vec::new() },
        timeouts: timeouts(typed)?,
    })
}

pub(super) fn timeouts(typed: &Typed) -> Result<Timeouts, Fatal> {
    let or = |id: Id, default: Duration| match number(typed, id)? {
        Some(0) => usage(format!("{} must be at least 1 second", called(id))),
        Some(seconds) => Ok(Duration::from_secs(seconds.into())),
        None => Ok(default),
    };
    let default = Timeouts::default();
    Ok(Timeouts {
        snoop: or(Id::SnoopTimeout, default.snoop)?,
        snoop_total: or(Id::SnoopTotal, default.snoop_total)?,
        dial: or(Id::DialTimeout, default.dial)?,
        backend_handshake: or(Id::BackendHandshakeTimeout, default.backend_handshake)?,
        greeting: or(Id::GreetingTimeout, default.greeting)?,
        replay: or(Id::ReplayTimeout, default.replay)?,
        handshake: or(Id::HandshakeTimeout, default.handshake)?,
        relay: or(Id::RelayTimeout, default.relay)?,
        farewell: or(Id::FarewellTimeout, default.farewell)?,
    })
}

fn backend_insecure(typed: &Typed, host: Option<&str>) -> Result<bool, Fatal> {
    match host.filter(|_| typed.times(Id::BackendInsecure) > 0) {
        None => Ok(false),
        Some(host) if is_local(host) => Ok(true),
        Some(host) => usage(format!(
            "--backend-insecure is only for localhost or a loopback address, not {host}; use --backend-ca"
        )),
    }
}

fn is_local(host: &str) -> bool {
    match host.parse::<IpAddr>() {
        Ok(address) => address.to_canonical().is_loopback(),
        Err(_) => host.eq_ignore_ascii_case("localhost"),
    }
}

fn backend_source(typed: &Typed, host: Option<&str>) -> Result<Option<IpAddr>, Fatal> {
    let Some(word) = text(typed, Id::BackendSource)? else { return Ok(None) };
    let Some(host) = host else { return usage("--backend-source: a UNIX socket has none".to_owned()) };
    match (word.parse::<IpAddr>(), host.parse::<IpAddr>()) {
        (Err(_), _) => usage(format!("--backend-source must be an IP address, not {word:?}")),
        (Ok(source), Ok(target)) if source.is_ipv4() != target.is_ipv4() => {
            usage(format!("--backend-source {source} can't reach {target}: one is IPv4, the other IPv6"))
        }
        (Ok(source), _) => Ok(Some(source)),
    }
}

/// Each `-v` or `-q` is one step from `info`, where the one line per session is said.
pub(super) fn verbosity(louder: u8, quieter: u8) -> LevelFilter {
    match i16::from(louder) - i16::from(quieter) {
        ..=-3 => LevelFilter::Off,
        -2 => LevelFilter::Error,
        -1 => LevelFilter::Warn,
        0 => LevelFilter::Info,
        1 => LevelFilter::Debug,
        2.. => LevelFilter::Trace,
    }
}

/// 0 drops nothing, and all ones tells the kernel to leave the id as it is: neither is what was meant.
pub(super) fn unprivileged(typed: &Typed, id: Id) -> Result<Option<u32>, Fatal> {
    match number(typed, id)? {
        Some(0 | u32::MAX) => usage(format!("{} must be an unprivileged id", called(id))),
        number => Ok(number),
    }
}

pub(super) fn text(typed: &Typed, id: Id) -> Result<Option<&str>, Fatal> {
    match typed.value(id).map(|word| word.to_str().ok_or(word)) {
        None => Ok(None),
        Some(Ok(text)) => Ok(Some(text)),
        Some(Err(word)) => usage(format!("{}: not text: {word:?}", called(id))),
    }
}

pub(super) fn number(typed: &Typed, id: Id) -> Result<Option<u32>, Fatal> {
    match typed.value(id) {
        None => Ok(None),
        Some(word) => match word.to_str().and_then(parsed) {
            Some(number) => Ok(Some(number)),
            None => usage(format!("{} wants a number up to {}, not {word:?}", called(id), u32::MAX)),
        },
    }
}

/// A number. `str::parse` takes a plus sign, we don't.
pub(super) fn parsed<T: FromStr>(word: &str) -> Option<T> {
    let is_digits = word.bytes().all(|octet| octet.is_ascii_digit());
    if is_digits { word.parse().ok() } else { None }
}

fn chosen<T: Copy + Default>(typed: &Typed, id: Id, choices: &[(&str, T)]) -> Result<T, Fatal> {
    let Some(word) = typed.value(id) else { return Ok(T::default()) };
    match choices.iter().find(|&&(name, _)| word == name) {
        Some(&(_, choice)) => Ok(choice),
        None => usage(format!("{} takes {}, not {word:?}", called(id), OPTIONS[id as usize].value.unwrap_or_default())),
    }
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;
