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

/// The two ends of the client's connection, its own and ours: each from the UCSPI server's variables where they say one, else from
/// the socket. `None`: one of them is unknown, and nothing may be said in its place.
///
/// What the variables say and is no address is not passed over: the socket's other end is then not the client but who accepted it for
/// us, often on loopback, which servers trust. A port that is none may be the socket's, if that has the same address.
pub fn ends(
    environment: impl Fn(&str) -> Option<OsString>,
    socket: impl Fn() -> Option<[SocketAddr; 2]>,
) -> Option<[SocketAddr; 2]> {
    let end = |ip: &str, port: &str, own: fn([SocketAddr; 2]) -> SocketAddr| {
        let Some(word) = environment(ip).filter(|word| !word.is_empty()) else { return socket().map(own) };
        let address: IpAddr = word.to_str()?.parse().ok()?;
        let port = environment(port).and_then(|word| word.to_str()?.parse().ok()).filter(|&port: &u16| port > 0);
        match port {
            Some(port) => Some(SocketAddr::new(address, port)),
            None => socket().map(own).filter(|end| end.ip().to_canonical() == address.to_canonical()),
        }
    };
    let client = end("TCPREMOTEIP", "TCPREMOTEPORT", |[client, _]| client)?;
    let local = end("TCPLOCALIP", "TCPLOCALPORT", |[_, local]| local)?;
    Some([client, local])
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
    fn an_end_is_what_the_variables_say_or_the_sockets_where_they_say_none_and_else_unknown() {
        let socket: [SocketAddr; 2] = ["192.0.2.1:4711", "192.0.2.2:25"].map(|end| end.parse().unwrap());
        let given = |ip: &'static str, port: &'static str| {
            move |name: &str| match name {
                "TCPREMOTEIP" => Some(ip.into()),
                "TCPREMOTEPORT" => Some(port.into()),
                _ => None,
            }
        };
        let [client, local] = ends(given("2001:db8::1", "7"), || Some(socket)).unwrap();
        assert_eq!((client.to_string(), local), ("[2001:db8::1]:7".to_owned(), socket[1]));
        for (ip, port) in [("", "7"), ("", ""), ("192.0.2.1", ""), ("192.0.2.1", "0"), ("::ffff:192.0.2.1", "x")] {
            assert_eq!(ends(given(ip, port), || Some(socket)), Some(socket), "{ip} {port}");
            assert_eq!(ends(given(ip, port), || None), None, "{ip} {port}");
        }
        for (ip, port) in [("1.2.3.4\r\nXCLIENT", "7"), ("mx.example", "7"), ("1.2.3.4", "0"), ("1.2.3.4", "")] {
            assert_eq!(ends(given(ip, port), || Some(socket)), None, "{ip} {port}: the socket's is somebody else");
        }
        assert_eq!(ends(given("1.2.3.4", "7"), || None), None, "our own end is unknown");
    }

    #[test]
    fn a_socket_says_the_same() {
        let peer: SocketAddr = "[::ffff:192.0.2.1]:4711".parse().unwrap();
        assert_eq!(ClientInfo::from(peer).to_string(), "192.0.2.1:4711");
    }
}
