//! Why the program never started: what failed, on what, what to do; with its exit code.

use core::fmt;
use core::net::SocketAddr;

/// Exit codes, as skarnet's programs use them (protocol.md, Signals and exits).
pub mod exit {
    /// The session is over, whatever was said in it.
    pub const OVER: u8 = 0;
    /// The client broke off or broke the rules.
    pub const CLIENT: u8 = 1;
    /// The TLS configuration is unusable.
    pub const TLS_CONFIGURATION: u8 = 96;
    /// The TLS engine failed.
    pub const TLS_ENGINE: u8 = 97;
    /// The handshake with the client failed.
    pub const HANDSHAKE: u8 = 98;
    /// A time-out.
    pub const TIMEOUT: u8 = 99;
    /// The command line is wrong.
    pub const USAGE: u8 = 100;
    /// A bug of ours.
    pub const BUG: u8 = 101;
    /// A system call, the child or the backend failed.
    pub const SYSTEM: u8 = 111;
}

/// A failure before the first session began. Displayed as one line for the operator.
#[derive(Debug)]
pub enum Fatal {
    /// The command line or the environment is wrong: what, and what to write instead.
    Usage(String),
    /// A system call failed: what was being done, and the error.
    System(&'static str, std::io::Error),
    /// Nothing can be heard at this address.
    Listen(SocketAddr, std::io::Error),
}

impl Fatal {
    /// The exit code that tells the supervisor.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Usage(_) => exit::USAGE,
            Self::System(..) | Self::Listen(..) => exit::SYSTEM,
        }
    }
}

impl fmt::Display for Fatal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Usage(what) => write!(f, "usage: {what}"),
            Self::System(doing, error) => write!(f, "can't {doing}: {error}"),
            Self::Listen(address, error) => write!(f, "can't listen on {address}: {error}"),
        }
    }
}

impl std::error::Error for Fatal {}
