//! The PROXY protocol's header: who the client is, for a server that takes our word (haproxy's proxy-protocol.txt, 2.1 and 2.2).
//!
//! Pure: two addresses in, and what is known of the client's TLS, the octets out. Addresses never come from anything that the
//! client said; of its TLS the server's name is its own word.

mod parse;

use core::net::{IpAddr, SocketAddr};

pub use parse::{LONGEST, Malformed, Parsed, parse};

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

/// The client's TLS, as it was negotiated. Version 1 has no room for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Details<'a> {
    /// `TLSv1.3`.
    pub version: &'a str,
    /// The cipher suite by its IANA name.
    pub suite: &'a str,
    /// The server name (SNI), if the client sent one.
    pub server_name: Option<&'a str>,
    /// The application protocol (ALPN), if one was agreed on.
    pub protocol: Option<&'a [u8]>,
}

/// What version 2 begins with.
const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
/// Version 2, and the connection of somebody else (PROXY).
const PROXY: u8 = 0x21;
const TCP_4: u8 = 0x11;
const TCP_6: u8 = 0x21;
/// The types of TLVs (2.2), `PP2_TYPE_` and `PP2_SUBTYPE_SSL_` there.
const ALPN: u8 = 0x01;
const AUTHORITY: u8 = 0x02;
const SSL: u8 = 0x20;
const SSL_VERSION: u8 = 0x21;
const SSL_CIPHER: u8 = 0x23;
/// What `SSL` begins with: PP2_CLIENT_SSL, and "no certificate of the client was verified".
const CLIENT_SSL: [u8; 5] = [0x01, 0, 0, 0, 1];

impl Header {
    /// Its octets, with the details where they are known. IPv4 in IPv6 is IPv4, but where the other end is IPv6: one header has
    /// one family.
    #[must_use]
    pub fn octets(&self, details: Option<&Details<'_>>) -> Vec<u8> {
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
            Version::V2 => self.binary(ends, ports, details),
        }
    }

    fn binary(&self, ends: [IpAddr; 2], ports: [u16; 2], details: Option<&Details<'_>>) -> Vec<u8> {
        let mut body = Vec::with_capacity(64);
        for end in ends {
            match end {
                IpAddr::V4(address) => body.extend(address.octets()),
                IpAddr::V6(address) => body.extend(address.octets()),
            }
        }
        body.extend(ports.iter().flat_map(|port| port.to_be_bytes()));
        if self.tls {
            let known = details.map(|details| {
                push(&mut body, ALPN, details.protocol);
                push(&mut body, AUTHORITY, details.server_name.map(str::as_bytes));
                (details.version, openssl_name(details.suite))
            });
            let mut ssl = CLIENT_SSL.to_vec();
            push(&mut ssl, SSL_VERSION, known.as_ref().map(|(version, _)| version.as_bytes()));
            push(&mut ssl, SSL_CIPHER, known.as_ref().map(|(_, cipher)| cipher.as_bytes()));
            push(&mut body, SSL, Some(&ssl));
        }
        let family = if ends[0].is_ipv4() { TCP_4 } else { TCP_6 };
        [&SIGNATURE[..], &[PROXY, family], &length(&body), &body].concat()
    }
}

/// One TLV, if there is a value.
fn push(body: &mut Vec<u8>, kind: u8, value: Option<&[u8]>) {
    if let Some(value) = value {
        body.push(kind);
        body.extend(length(value));
        body.extend(value);
    }
}

/// Of what has less than 64 KiB: two addresses, names of at most 255 octets.
fn length(octets: &[u8]) -> [u8; 2] {
    u16::try_from(octets.len()).unwrap_or(u16::MAX).to_be_bytes()
}

/// A suite as OpenSSL calls it, whose names the specification has: `ECDHE-RSA-AES128-GCM-SHA256`. Those of TLS 1.3 are IANA's.
fn openssl_name(suite: &str) -> String {
    match suite.strip_prefix("TLS_").filter(|name| name.contains("_WITH_")) {
        None => suite.to_owned(),
        // It leaves the hash out where there is no choice.
        Some(name) => {
            name.replace("_WITH_", "_").replace("AES_", "AES").replace("POLY1305_SHA256", "POLY1305").replace('_', "-")
        }
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
        Header { version, client: client.parse().unwrap(), local: local.parse().unwrap(), tls }.octets(None)
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
    fn detailed(details: &Details<'_>) -> Vec<u8> {
        let [client, local] = ["192.0.2.1:4711", "198.51.100.2:25"].map(|end| end.parse().unwrap());
        Header { version: Version::V2, client, local, tls: true }.octets(Some(details))[28..].to_vec()
    }

    #[test]
    fn version_2_has_the_details_as_the_specification_nests_them() {
        let known = Details { version: "TLSv1.3", suite: "TLS_AES_128_GCM_SHA256", server_name: None, protocol: None };
        let version = b"\x21\x00\x07TLSv1.3";
        let cipher = b"\x23\x00\x16TLS_AES_128_GCM_SHA256";
        let ssl = [&b"\x20\x00\x28\x01\x00\x00\x00\x01"[..], version, cipher].concat();
        assert_eq!(detailed(&known), ssl);
        let named = Details { server_name: Some("mx.example"), protocol: Some(b"smtp"), ..known };
        let expected = [&b"\x01\x00\x04smtp\x02\x00\x0amx.example"[..], &ssl].concat();
        assert_eq!(detailed(&named), expected);
    }

    #[test]
    fn the_length_of_the_header_counts_all_its_tlvs_and_one_segment_holds_the_longest() {
        let name = "a".repeat(253);
        let longest = Details {
            version: "TLSv1.2",
            suite: "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256",
            server_name: Some(&name),
            protocol: Some(b"esmtp"),
        };
        let [client, local] = ["[2001:db8::1]:4711", "[2001:db8::2]:25"].map(|end| end.parse().unwrap());
        let octets = Header { version: Version::V2, client, local, tls: true }.octets(Some(&longest));
        assert_eq!(usize::from(u16::from_be_bytes([octets[14], octets[15]])), octets.len() - 16);
        // The smallest segment that every host takes (RFC 879).
        assert!(octets.len() <= 536, "{}", octets.len());
    }

    #[test]
    fn neither_version_1_nor_a_client_without_tls_has_details() {
        let known = Details { version: "TLSv1.3", suite: "x", server_name: Some("y"), protocol: Some(b"z") };
        let [client, local] = ["192.0.2.1:4711", "198.51.100.2:25"].map(|end| end.parse().unwrap());
        for (version, tls) in [(Version::V1, true), (Version::V2, false)] {
            let header = Header { version, client, local, tls };
            assert_eq!(header.octets(Some(&known)), header.octets(None), "{version:?}");
        }
    }

    /// `openssl ciphers -stdname` has both names.
    #[test]
    fn ciphers_have_their_names_of_openssl() {
        for (iana, openssl) in [
            ("TLS_AES_256_GCM_SHA384", "TLS_AES_256_GCM_SHA384"),
            ("TLS_CHACHA20_POLY1305_SHA256", "TLS_CHACHA20_POLY1305_SHA256"),
            ("TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256", "ECDHE-RSA-AES128-GCM-SHA256"),
            ("TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384", "ECDHE-ECDSA-AES256-GCM-SHA384"),
            ("TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256", "ECDHE-RSA-CHACHA20-POLY1305"),
        ] {
            assert_eq!(openssl_name(iana), openssl);
        }
    }
}
