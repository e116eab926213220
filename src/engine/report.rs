//! What the operator reads: one summary line per session, and a line for what is worth one. Remote octets are escaped.

use std::time::{Duration, Instant};

use log::{info, warn};

use crate::client_info::ClientInfo;
use crate::logging::escape;
use crate::session::{EndReason, Note};
use crate::tls::Facts;
use crate::variables::{NAMES, Variable};

/// The longest server name that is worth printing (RFC 1035: 255).
const NAME: usize = 255;

/// Octets of the client's connection, as they were on the wire.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Tally {
    pub(super) received: u64,
    pub(super) sent: u64,
}

/// Says a note.
pub(super) fn note(client: &ClientInfo, note: &Note) {
    match note {
        Note::ChildOffersStarttls => {
            warn!("client={client}: the child offers STARTTLS itself; that offer is not shown");
        }
        Note::ChildNotSmtp => warn!("client={client}: the child speaks no SMTP that we know; snooping stopped"),
        Note::HandoverFailed(failure) => warn!("client={client}: STARTTLS answered 454: {failure}"),
        Note::TooManyHandovers => {
            warn!("client={client}: STARTTLS has failed too often in this session; the backend is not dialled again");
        }
        Note::NoCertificate => warn!("client={client}: STARTTLS answered 454: there is no usable certificate"),
    }
}

/// Says how a session ended: the summary line, and where somebody should look, and `is_ours` to say, a warning.
pub(super) fn end(
    client: &ClientInfo,
    reason: &EndReason,
    mode: &Mode<'_>,
    tally: Tally,
    recorded: u32,
    started: Instant,
    is_ours: bool,
) {
    if is_ours && reason.is_warning() {
        warn!("{}", warning(client, reason));
    }
    let Tally { received, sent } = tally;
    let seconds = Seconds(started.elapsed());
    info!(
        "client={client} end=\"{reason}\" mode={mode} received={received} sent={sent} recorded={recorded} seconds={seconds}"
    );
}

/// What that warning is.
pub(super) fn warning(client: &ClientInfo, reason: &EndReason) -> String {
    format!("client={client}: {reason}")
}

struct Seconds(Duration);

impl core::fmt::Display for Seconds {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{}.{:03}", self.0.as_secs(), self.0.subsec_millis())
    }
}

/// How the client was served.
pub(super) enum Mode<'a> {
    /// Without TLS.
    Plain,
    /// Through TLS of ours.
    Tls(&'a Facts),
    /// Through TLS of the UCSPI-TLS server, of which it has told this.
    Told(&'a [Variable]),
    /// Through TLS between it and HOST.
    Raw,
    /// Through TLS before us.
    Mute,
}

impl core::fmt::Display for Mode<'_> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let facts = match self {
            Self::Plain => return f.write_str("plain"),
            Self::Raw => return f.write_str("raw"),
            Self::Mute => return f.write_str("mute"),
            Self::Told(variables) => {
                f.write_str("tls")?;
                for (word, name) in ["tls", "suite", "sni"].into_iter().zip(NAMES) {
                    match variables.iter().find(|(known, _)| known == name) {
                        Some((_, value)) => write!(f, " {word}={}", escape(value, NAME))?,
                        None => write!(f, " {word}=-")?,
                    }
                }
                return Ok(());
            }
            Self::Tls(facts) => facts,
        };
        write!(f, "tls tls={} suite={}", facts.version, facts.suite)?;
        if let Some(group) = &facts.group {
            write!(f, " group={group}")?;
        }
        match &facts.sni {
            Some(name) => write!(f, " sni={}", escape(name.as_bytes(), NAME))?,
            None => f.write_str(" sni=-")?,
        }
        write!(f, " resumed={}", if facts.resumed { "yes" } else { "no" })
    }
}
