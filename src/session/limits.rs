//! Every limit that is no option: a number, its unit, and where it comes from.

use core::time::Duration;

/// Replies owed at once before the client is no longer read. Far above what a client pipelines (Postfix sends a few
/// dozen commands); an entry is a few octets.
pub const REPLIES_OWED: usize = 128;

/// Octets waiting for the child before the client is no longer read.
pub const TO_SERVER: usize = 16 * 1024;

/// Octets waiting for the client before the child is no longer read.
pub const TO_CLIENT: usize = 64 * 1024;

/// Bad lines that get a 500; the next gets a 421 (protocol.md, Snoop 2; Postfix smtpd_hard_error_limit is 20).
pub const BAD_LINES: u32 = 10;

/// Hand-overs that may fail in one session; after that STARTTLS is answered 454 without dialling, or one client could have us
/// dial, and log, without end.
pub const HANDOVERS: u32 = 10;

/// A listener's `--max-errors` where nothing is said (Postfix smtpd_hard_error_limit).
pub const LISTENER_ERRORS: u32 = 20;

/// A listener's `--max-starttls` where nothing is said: behind as many the backend is not dialled anyway.
pub const LISTENER_STARTTLS: u32 = HANDOVERS;

/// Between two commands, where places are scarce (Postfix smtpd_timeout under stress).
pub const STRESSED_SNOOP: Duration = Duration::from_secs(10);

/// All of the snooping then. A client that says a command every nine seconds has said six; one that means it has said MAIL by then.
pub const STRESSED_SNOOP_TOTAL: Duration = Duration::from_secs(60);

/// The TLS handshake with the client then (Postfix smtpd_starttls_timeout under stress).
pub const STRESSED_HANDSHAKE: Duration = Duration::from_secs(10);

/// Silence in a relay then. Not Postfix's 10 seconds: what is relayed is not read, so that a server that thinks about a letter looks like a
/// client that sleeps, and to cut that is to have the letter twice. Five minutes is what RFC 5321 4.5.3.2.7 has a server wait at least.
pub const STRESSED_RELAY: Duration = Duration::from_secs(300);

/// An EHLO reply longer than this is passed on as it comes, without STARTTLS. RFC 5321 knows some forty keywords.
pub const EHLO_REPLY: usize = 64 * 1024;

/// A line of an EHLO reply longer than this likewise (security.md 68).
pub const EHLO_LINE: usize = 4096;

/// Octets of a backend's greeting or reply during the replay; a longer one is a failure.
pub const BACKEND_REPLY: usize = 64 * 1024;

/// Octets of transcript; further commands are not recorded, which the replay then says.
pub const TRANSCRIPT: usize = 64 * 1024;

/// How long a child may leave an unknown verb unanswered while the client already sends more (protocol.md, Snoop 5).
pub const UNKNOWN_VERB: Duration = Duration::from_secs(5);

/// How long what a server said before it closed may take to reach a client that reads slowly.
pub const FLUSH: Duration = Duration::from_secs(30);

/// How long a farewell of ours may take to leave, and how long the client's last octets are drained (Postfix and Exim
/// drain alike; a plain close with unread input resets the connection and eats the last reply, RFC 1122 4.2.2.13).
pub const LINGER: Duration = Duration::from_secs(2);

/// How many of the client's octets are drained then.
pub const DRAIN: usize = 64 * 1024;

/// Once the server's side of a relay has ended, how long the client's may stay silent.
pub const HALF_CLOSED: Duration = Duration::from_secs(10);
