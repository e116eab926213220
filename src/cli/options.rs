//! The table of options. Parsing, the pages of [`super::help`] and the README's table are all made from it, so that none can lag behind.

/// Every option, in the order of [`OPTIONS`]: `OPTIONS[id as usize].id == id`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the table says what each one means")]
pub enum Id {
    Cert,
    Key,
    SelfSigned,
    TicketKeys,
    Way,
    Mute,
    Told,
    BackendCa,
    CaDir,
    BackendName,
    BackendInsecure,
    BackendSource,
    SendProxy,
    ProxyFacts,
    TrustedLoopback,
    Replay,
    RequireTls,
    Refusals,
    MaxErrors,
    MaxStarttls,
    Cutoff,
    Relay,
    Greeting,
    SnoopTimeout,
    SnoopTotal,
    DialTimeout,
    BackendHandshakeTimeout,
    GreetingTimeout,
    ReplayTimeout,
    HandshakeTimeout,
    RelayTimeout,
    FarewellTimeout,
    TlsUid,
    TlsGid,
    Listen,
    Plain,
    Lazy,
    Workers,
    MaxSessions,
    Drain,
    NotifyFd,
    NotifySocket,
    ListenFds,
    ListenPid,
    MaxPerIp,
    RatePerIp,
    ProxyProtocol,
    ProxyFrom,
    Metrics,
    Uid,
    Gid,
    NoSandbox,
    Check,
    Probe,
    Verbose,
    Quiet,
    RustLog,
    Help,
    HelpListen,
    Version,
    HelpMarkdown,
}

/// Under which heading `--help` lists an option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Group {
    /// Who we are to the client.
    Certificate,
    /// How HOST PORT is reached, trusted and told.
    Backend,
    /// When snooping ends, and what is served without TLS.
    Policy,
    /// How long each wait may last.
    Timeouts,
    /// Many sessions in one process.
    Listener,
    /// Privileges, logging and help.
    General,
    /// Not listed at all.
    Hidden,
}

/// One option, or one environment variable that has no option.
#[derive(Debug)]
pub struct OptionSpec {
    /// Which one.
    pub id: Id,
    /// The long name without its dashes; empty where there is only the variable.
    pub long: &'static str,
    /// The one-letter name.
    pub short: Option<char>,
    /// What the value is called; `None` for a flag.
    pub value: Option<&'static str>,
    /// The environment variable; read only where there is a value, and only if the option was not typed. A flag's is one that it
    /// minds.
    pub env: Option<&'static str>,
    /// The default as the manual prints it; empty where there is none.
    pub default: &'static str,
    /// What it does, in one line.
    pub meaning: &'static str,
    /// Its heading.
    pub group: Group,
}

/// How many rows the table has.
pub const COUNT: usize = OPTIONS.len();

/// The variables that are ours: PROG must not find them in its environment.
pub const OWN_VARIABLES: [&str; 10] = [
    "CERTFILE",
    "KEYFILE",
    "CAFILE",
    "CADIR",
    "TLS_UID",
    "TLS_GID",
    "STARTTLS_REPLAY",
    "SSLCTLFD",
    "SSLREADFD",
    "SSLWRITEFD",
];

/// Those that are a listener's besides: a UCSPI child's PROG may need them. What a supervisor says to us alone is among them, whether we
/// read it or not.
pub const LISTENER_VARIABLES: [&str; 9] = [
    "UID",
    "GID",
    "NOTIFY_SOCKET",
    "LISTEN_FDS",
    "LISTEN_PID",
    "LISTEN_PIDFDID",
    "LISTEN_FDNAMES",
    "WATCHDOG_USEC",
    "WATCHDOG_PID",
];

const fn flag(id: Id, long: &'static str, group: Group, meaning: &'static str) -> OptionSpec {
    OptionSpec { id, long, short: None, value: None, env: None, default: "", meaning, group }
}

const fn valued(
    id: Id,
    long: &'static str,
    value: &'static str,
    default: &'static str,
    group: Group,
    meaning: &'static str,
) -> OptionSpec {
    OptionSpec { id, long, short: None, value: Some(value), env: None, default, meaning, group }
}

const fn variable(id: Id, name: &'static str, group: Group, meaning: &'static str) -> OptionSpec {
    OptionSpec { id, long: "", short: None, value: None, env: Some(name), default: "", meaning, group }
}

const fn timeout(id: Id, long: &'static str, default: &'static str, meaning: &'static str) -> OptionSpec {
    valued(id, long, "N", default, Group::Timeouts, meaning)
}

impl OptionSpec {
    const fn with_env(self, name: &'static str) -> Self {
        Self { env: Some(name), ..self }
    }

    const fn with_short(self, letter: char) -> Self {
        Self { short: Some(letter), ..self }
    }

    const fn with_value(self, value: &'static str) -> Self {
        Self { value: Some(value), ..self }
    }

    /// What an error message calls it: `--cert`, or `TLS_UID` for a variable without option.
    #[must_use]
    pub fn called(&self) -> String {
        if self.long.is_empty() { self.env.unwrap_or_default().to_owned() } else { format!("--{}", self.long) }
    }
}

/// The table.
pub const OPTIONS: [OptionSpec; 61] = [
    valued(Id::Cert, "cert", "FILE", "", Group::Certificate, "our certificate chain, PEM").with_env("CERTFILE"),
    valued(Id::Key, "key", "FILE", "the --cert file", Group::Certificate, "the private key of --cert, PEM")
        .with_env("KEYFILE"),
    valued(
        Id::SelfSigned,
        "self-signed",
        "NAME",
        "",
        Group::Certificate,
        "instead: a throw-away certificate for NAME, made in memory",
    ),
    valued(
        Id::TicketKeys,
        "ticket-keys",
        "FILE",
        "",
        Group::Certificate,
        "clients may resume sessions by tickets of these keys",
    ),
    valued(Id::Way, "way", "WAY", "tls", Group::Backend, "who is behind TLS, HOST or PROG, and how it is reached"),
    flag(Id::Mute, "mute", Group::Backend, "behind HOST's TLS in --way raw; =always, =PORT,...: whom to mute"),
    variable(Id::Told, "STARTTLS_REPLAY", Group::Backend, "with --mute: what PROG is told first, a command a line")
        .with_value("LINES"),
    valued(Id::BackendCa, "backend-ca", "FILE", "", Group::Backend, "certificates that HOST's is checked against, PEM")
        .with_env("CAFILE"),
    variable(Id::CaDir, "CADIR", Group::Backend, "a directory of such certificates; not read with --backend-ca")
        .with_value("DIR"),
    valued(
        Id::BackendName,
        "backend-name",
        "NAME",
        "HOST",
        Group::Backend,
        "the name that HOST's certificate must bear",
    ),
    flag(
        Id::BackendInsecure,
        "backend-insecure",
        Group::Backend,
        "do not check HOST's certificate; only for localhost or loopback",
    ),
    valued(
        Id::BackendSource,
        "backend-source",
        "ADDR",
        "",
        Group::Backend,
        "local address to connect from, so that HOST can deny relaying",
    ),
    valued(
        Id::SendProxy,
        "send-proxy",
        "v1|v2",
        "",
        Group::Backend,
        "tell HOST who the client is by a PROXY header; it must expect one",
    ),
    valued(
        Id::ProxyFacts,
        "proxy-facts",
        "early|late",
        "early",
        Group::Backend,
        "late: the v2 header waits for facts of the client's TLS",
    ),
    flag(
        Id::TrustedLoopback,
        "trusted-loopback",
        Group::Backend,
        "do not warn that a server on this host may relay for everybody",
    ),
    valued(
        Id::Replay,
        "replay",
        "hello|all|none",
        "hello",
        Group::Backend,
        "what HOST is told before the client speaks inside TLS",
    ),
    flag(Id::RequireTls, "require-tls", Group::Policy, "no TLS by the cutoff, no service (not for a public MX)"),
    valued(
        Id::Refusals,
        "refusals",
        "N",
        "1",
        Group::Policy,
        "with --require-tls: so many commands get 530 before the 421",
    ),
    valued(Id::MaxErrors, "max-errors", "N", "20 with --listen", Group::Policy, "commands answered 5yz before the 421"),
    valued(
        Id::MaxStarttls,
        "max-starttls",
        "N",
        "10 with --listen",
        Group::Policy,
        "STARTTLS answered 454 before the 421",
    ),
    valued(Id::Cutoff, "cutoff", "LIST", "", Group::Policy, "further ends of snooping: VERB,...,commands=N,seconds=N"),
    valued(Id::Relay, "relay", "splice|copy", "splice", Group::Policy, "how relayed plaintext moves"),
    valued(Id::Greeting, "greeting", "FILE", "", Group::Policy, "what PROG would say until it is needed; see --probe"),
    timeout(Id::SnoopTimeout, "snoop-timeout", "300", "between two commands"),
    timeout(Id::SnoopTotal, "snoop-total", "600", "all snooping together"),
    timeout(Id::DialTimeout, "dial-timeout", "10", "connecting to HOST PORT, or starting PROG when it is needed"),
    timeout(Id::BackendHandshakeTimeout, "backend-handshake-timeout", "10", "TLS handshake with HOST PORT"),
    timeout(Id::GreetingTimeout, "greeting-timeout", "30", "the greeting of HOST, or of PROG when it is needed"),
    timeout(Id::ReplayTimeout, "replay-timeout", "30", "HOST's replies to the replay"),
    timeout(Id::HandshakeTimeout, "handshake-timeout", "30", "TLS handshake with the client"),
    timeout(Id::RelayTimeout, "relay-timeout", "1200", "silence once bytes are relayed"),
    timeout(Id::FarewellTimeout, "farewell-timeout", "5", "PROG's exit before SIGTERM, and again before SIGKILL"),
    variable(Id::TlsUid, "TLS_UID", Group::General, "user id to take on once the key is read").with_value("UID"),
    variable(Id::TlsGid, "TLS_GID", Group::General, "group id to take on once the key is read").with_value("GID"),
    valued(
        Id::Listen,
        "listen",
        "ADDR:PORT",
        "",
        Group::Listener,
        "be no UCSPI child but listen here; also fd:N, systemd; repeatable",
    ),
    valued(Id::Plain, "plain", "ADDR", "", Group::Listener, "a daemon in place of PROG: HOST:PORT or unix:PATH"),
    flag(Id::Lazy, "lazy", Group::Listener, "the default: a server when a client needs one; =no: at once"),
    valued(Id::Workers, "workers", "N", "processors", Group::Listener, "loops, each with sockets of its own"),
    valued(Id::MaxSessions, "max-sessions", "N", "10000", Group::Listener, "at once; one more hears 421"),
    valued(Id::Drain, "drain", "N", "30", Group::Listener, "SIGTERM: sessions have so many seconds to end, then 421"),
    valued(Id::NotifyFd, "notify-fd", "N", "", Group::Listener, "gets a line feed once clients are served (s6)"),
    variable(Id::NotifySocket, "NOTIFY_SOCKET", Group::Listener, "is told the same, and of reload and stop (systemd)")
        .with_value("PATH"),
    variable(Id::ListenFds, "LISTEN_FDS", Group::Listener, "for --listen systemd: how many sockets").with_value("N"),
    variable(Id::ListenPid, "LISTEN_PID", Group::Listener, "for --listen systemd: whose they are").with_value("PID"),
    valued(Id::MaxPerIp, "max-per-ip", "N", "", Group::Listener, "sessions at once of one IPv4 address or IPv6 /64"),
    valued(Id::RatePerIp, "rate-per-ip", "N", "", Group::Listener, "new sessions a second of one such address"),
    flag(
        Id::ProxyProtocol,
        "proxy-protocol",
        Group::Listener,
        "a PROXY header says who the client is; none: no service",
    ),
    valued(
        Id::ProxyFrom,
        "proxy-from",
        "NET,...",
        "",
        Group::Listener,
        "with it: whose header counts, as 192.0.2.7,2001:db8::/64",
    ),
    valued(
        Id::Metrics,
        "metrics",
        "ADDR:PORT",
        "",
        Group::Listener,
        "tell figures by HTTP there: /metrics (Prometheus), /healthz",
    ),
    variable(Id::Uid, "UID", Group::Listener, "user id that PROG is to have").with_value("UID"),
    variable(Id::Gid, "GID", Group::Listener, "group id that PROG is to have").with_value("GID"),
    flag(Id::NoSandbox, "no-sandbox", Group::General, "keep every right that the kernel gives us"),
    flag(Id::Check, "check", Group::General, "try all of it without a client; exit 1: a problem").with_env("NO_COLOR"),
    flag(Id::Probe, "probe", Group::General, "print what PROG says to everybody, for --greeting"),
    flag(Id::Verbose, "verbose", Group::General, "say more on stderr: -v debug, -vv trace").with_short('v'),
    flag(Id::Quiet, "quiet", Group::General, "say less: -q warnings, -qq errors, -qqq nothing").with_short('q'),
    variable(
        Id::RustLog,
        "RUST_LOG",
        Group::General,
        "log levels by module, before -v, -q: warn,starttls_wrapper=trace",
    ),
    flag(Id::Help, "help", Group::General, "this list").with_short('h'),
    flag(Id::HelpListen, "help-listen", Group::General, "the options of a listener: many sessions in one process"),
    flag(Id::Version, "version", Group::General, "name and version").with_short('V'),
    flag(Id::HelpMarkdown, "help-markdown", Group::Hidden, "the README's table of options"),
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::limits;
    use crate::session::policy::{Policy, Timeouts};

    #[test]
    fn ids_are_the_rows_of_the_table() {
        for (row, spec) in OPTIONS.iter().enumerate() {
            assert_eq!(spec.id as usize, row, "{:?}", spec.id);
        }
    }

    #[test]
    fn names_are_unique_and_every_row_has_one() {
        for (row, spec) in OPTIONS.iter().enumerate() {
            assert!(!spec.called().is_empty(), "row {row}");
            assert!(!spec.meaning.is_empty());
            for other in &OPTIONS[row + 1..] {
                assert_ne!(spec.called(), other.called());
                assert!(spec.short.is_none() || spec.short != other.short);
                assert!(spec.env.is_none() || spec.env != other.env);
            }
        }
    }

    #[test]
    fn every_variable_that_is_read_is_kept_from_prog() {
        for spec in OPTIONS.iter().filter(|spec| spec.value.is_some()) {
            if let Some(name) = spec.env {
                let is_listeners = spec.group == Group::Listener;
                let kept: &[&str] = if is_listeners { &LISTENER_VARIABLES } else { &OWN_VARIABLES };
                assert!(kept.contains(&name), "{name}");
            }
        }
    }

    #[test]
    fn printed_defaults_are_the_defaults_in_force() {
        let times = Timeouts::default();
        for (id, value) in [
            (Id::SnoopTimeout, times.snoop),
            (Id::SnoopTotal, times.snoop_total),
            (Id::DialTimeout, times.dial),
            (Id::BackendHandshakeTimeout, times.backend_handshake),
            (Id::GreetingTimeout, times.greeting),
            (Id::ReplayTimeout, times.replay),
            (Id::HandshakeTimeout, times.handshake),
            (Id::RelayTimeout, times.relay),
            (Id::FarewellTimeout, times.farewell),
        ] {
            assert_eq!(OPTIONS[id as usize].default, value.as_secs().to_string(), "{id:?}");
        }
        assert_eq!(OPTIONS[Id::Refusals as usize].default, Policy::default().refusals.to_string());
        for (id, value) in [(Id::MaxErrors, limits::LISTENER_ERRORS), (Id::MaxStarttls, limits::LISTENER_STARTTLS)] {
            assert_eq!(OPTIONS[id as usize].default, format!("{value} with --listen"), "{id:?}");
        }
    }
}
