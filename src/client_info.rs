//! Who the client is, for the log. Never from bytes that the client sent: from the UCSPI server or from the socket.

use core::fmt;
use core::net::{IpAddr, SocketAddr};
use std::ffi::{OsStr, OsString};

/// The client's address, as far as it is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct ClientInfo {
    /// Its address; an IPv4 address mapped into IPv6 is given as IPv4.
    pub address: Option<IpAddr>,
    /// Its port.
    pub port: Option<u16>,
}

impl ClientInfo {
    /// What the UCSPI server says in TCPREMOTEIP and TCPREMOTEPORT; `environment` gives a variable's value.
    /// What is no address literal, or no port, is taken as unknown.
    #[must_use]
    pub fn from_ucspi(environment: impl Fn(&str) -> Option<OsString>) -> Self {
        let address = environment("TCPREMOTEIP").as_deref().and_then(OsStr::to_str).and_then(|word| word.parse().ok());
        let port = environment("TCPREMOTEPORT").as_deref().and_then(OsStr::to_str).and_then(|word| word.parse().ok());
        Self { address: address.map(|address: IpAddr| address.to_canonical()), port: port.filter(|&port| port > 0) }
    }
}

impl From<SocketAddr> for ClientInfo {
    fn from(peer: SocketAddr) -> Self {
        Self { address: Some(peer.ip().to_canonical()), port: Some(peer.port()) }
    }
}

impl fmt::Display for ClientInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.address, self.port) {
            (Some(address), Some(port)) => SocketAddr::new(address, port).fmt(f),
            (Some(address), None) => address.fmt(f),
            (None, _) => f.write_str("unknown"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(ip: &str, port: &str) -> String {
        let environment = |name: &str| match name {
            "TCPREMOTEIP" => Some(ip.into()),
            "TCPREMOTEPORT" => Some(port.into()),
            _ => None,
        };
        ClientInfo::from_ucspi(environment).to_string()
    }

    #[test]
    fn addresses_are_shown_with_their_port() {
        assert_eq!(shown("192.0.2.1", "4711"), "192.0.2.1:4711");
        assert_eq!(shown("2001:db8::1", "25"), "[2001:db8::1]:25");
        assert_eq!(shown("::ffff:192.0.2.1", "25"), "192.0.2.1:25");
    }

    #[test]
    fn what_is_no_literal_is_unknown() {
        for ip in ["", "mx.example.org", "192.0.2", "192.0.2.1\nx", "[::1]", "192.0.2.1:25"] {
            assert_eq!(shown(ip, "25"), "unknown", "{ip}");
        }
        assert_eq!(ClientInfo::from_ucspi(|_| None), ClientInfo::default());
    }

    #[test]
    fn a_port_that_is_none_is_left_out() {
        for port in ["", "0", "65536", "smtp"] {
            assert_eq!(shown("192.0.2.1", port), "192.0.2.1", "{port}");
            assert_eq!(shown("2001:db8::1", port), "2001:db8::1", "{port}");
        }
    }

    #[test]
    fn a_socket_says_the_same() {
        let peer: SocketAddr = "[::ffff:192.0.2.1]:4711".parse().unwrap();
        assert_eq!(ClientInfo::from(peer).to_string(), "192.0.2.1:4711");
    }
}
