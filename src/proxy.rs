//! The PROXY protocol's header: who the client is, for a server that takes our word (haproxy's proxy-protocol.txt, 2.1 and 2.2).
//!
//! Pure: two addresses in, the octets out. Never from anything that the client said.

use core::net::{IpAddr, SocketAddr};

/// Which of its two forms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// A line of text.
    V1,
    /// Binary, with room for more than addresses.
    V2,
}

/// What the header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Its form.
    pub version: Version,
    /// The client's end of its connection.
    pub client: SocketAddr,
    /// Our end of it.
    pub local: SocketAddr,
    /// The client speaks TLS to us, or will before anything of it comes through. Version 1 can't say it.
    pub tls: bool,
}

/// What version 2 begins with.
const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
/// Version 2, and the connection of somebody else (PROXY).
const PROXY: u8 = 0x21;
const TCP_4: u8 = 0x11;
const TCP_6: u8 = 0x21;
/// PP2_TYPE_SSL, with nothing behind its own five octets: PP2_CLIENT_SSL, and "no certificate of the client was verified".
const TLS: [u8; 8] = [0x20, 0, 5, 0x01, 0, 0, 0, 1];

impl Header {
    /// Its octets. IPv4 in IPv6 is IPv4, but where the other end is IPv6: one header has one family.
    #[must_use]
    pub fn octets(&self) -> Vec<u8> {
        let ends = match (self.client.ip().to_canonical(), self.local.ip().to_canonical()) {
            (client @ IpAddr::V4(_), local @ IpAddr::V4(_)) => [client, local],
            (client, local) => [client, local].map(in_ipv6),
        };
        let ports = [self.client.port(), self.local.port()];
        match self.version {
            Version::V1 => {
                let family = if ends[0].is_ipv4() { '4' } else { '6' };
                format!("PROXY TCP{family} {} {} {} {}\r\n", ends[0], ends[1], ports[0], ports[1]).into_bytes()
            }
            Version::V2 => self.binary(ends, ports),
        }
    }

    fn binary(&self, ends: [IpAddr; 2], ports: [u16; 2]) -> Vec<u8> {
        let mut body = Vec::with_capacity(64);
        for end in ends {
            match end {
                IpAddr::V4(address) => body.extend(address.octets()),
                IpAddr::V6(address) => body.extend(address.octets()),
            }
        }
        body.extend(ports.iter().flat_map(|port| port.to_be_bytes()));
        if self.tls {
            body.extend(TLS);
        }
        let family = if ends[0].is_ipv4() { TCP_4 } else { TCP_6 };
        // At most 16 + 16 + 4 + 8 octets.
        let length = u16::try_from(body.len()).unwrap_or(u16::MAX).to_be_bytes();
        [&SIGNATURE[..], &[PROXY, family], &length, &body].concat()
    }
}

fn in_ipv6(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped().into(),
        IpAddr::V6(_) => address,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(version: Version, client: &str, local: &str, tls: bool) -> Vec<u8> {
        Header { version, client: client.parse().unwrap(), local: local.parse().unwrap(), tls }.octets()
    }

    fn line(client: &str, local: &str) -> String {
        String::from_utf8(header(Version::V1, client, local, true)).unwrap()
    }

    #[test]
    fn version_1_is_a_line_as_in_the_specification() {
        assert_eq!(line("192.168.0.1:56324", "192.168.0.11:443"), "PROXY TCP4 192.168.0.1 192.168.0.11 56324 443\r\n");
        assert_eq!(line("[2001:db8::1]:4711", "[2001:db8::2]:25"), "PROXY TCP6 2001:db8::1 2001:db8::2 4711 25\r\n");
    }

    #[test]
    fn the_longest_line_is_the_104_octets_of_the_specification() {
        let worst = "[ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff]:65535";
        assert_eq!(line(worst, worst).len(), 104);
    }

    #[test]
    fn mapped_addresses_are_ipv4_where_both_are() {
        assert_eq!(line("[::ffff:192.0.2.1]:1", "192.0.2.2:25"), "PROXY TCP4 192.0.2.1 192.0.2.2 1 25\r\n");
        assert_eq!(line("[2001:db8::1]:1", "192.0.2.2:25"), "PROXY TCP6 2001:db8::1 ::ffff:192.0.2.2 1 25\r\n");
    }

    #[test]
    fn version_2_has_signature_family_length_and_both_ends() {
        let plain = header(Version::V2, "192.0.2.1:4711", "198.51.100.2:25", false);
        let expected =
            b"\x0d\x0a\x0d\x0a\x00\x0d\x0aQUIT\x0a\x21\x11\x00\x0c\xc0\x00\x02\x01\xc6\x33\x64\x02\x12\x67\x00\x19";
        assert_eq!(plain, expected);
        let six = header(Version::V2, "[2001:db8::1]:4711", "[::1]:25", false);
        assert_eq!((six.len(), &six[12..16]), (16 + 36, &b"\x21\x21\x00\x24"[..]));
    }

    #[test]
    fn version_2_says_tls_without_details() {
        let plain = header(Version::V2, "192.0.2.1:4711", "198.51.100.2:25", false);
        let tls = header(Version::V2, "192.0.2.1:4711", "198.51.100.2:25", true);
        assert_eq!(&tls[14..16], [0, 20]);
        assert_eq!(tls[16..28], plain[16..28]);
        assert_eq!(tls[28..], [0x20, 0, 5, 1, 0, 0, 0, 1]);
    }
}
