//! A PROXY header that somebody else has sent: who the client is, by the word of a load balancer (haproxy's proxy-protocol.txt, 2.1 and 2.2).
//!
//! Pure and without state: what has come so far goes in, and is either the beginning of a header, or a whole one whose length says where
//! the client's own octets begin, or none. Strict: what is no TCP has no address that could be believed, and the sender's in its place may
//! be one that servers trust. What version 2 says behind the addresses is not ours.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use core::str::FromStr;

use super::{PROXY, SIGNATURE, TCP_4, TCP_6};

/// The longest line of version 1, CRLF included (2.1).
const LONGEST_LINE: usize = 107;

/// Octets of version 2 before what its length counts.
const FIXED: usize = 16;

/// The longest header that is heard. Version 2 may have 64 KiB, senders write some hundred octets; with a client's certificate it may be
/// two or three thousand.
pub const LONGEST: usize = 4096;

/// Version 2, and the sender's own connection: a health check.
const LOCAL: u8 = 0x20;

const LINE: &[u8] = b"PROXY ";

/// A whole header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parsed {
    /// Its octets; what follows them is the client's.
    pub length: usize,
    /// The client's end of its connection, and the one that it reached. `None`: the sender speaks for itself, or does not know.
    pub ends: Option<[SocketAddr; 2]>,
}

/// What is wrong, in words for the log.
pub type Malformed = &'static str;

/// Looks at the beginning of a connection; `Ok(None)`: more must come.
///
/// # Errors
/// It can't become a header, whatever comes.
pub fn parse(octets: &[u8]) -> Result<Option<Parsed>, Malformed> {
    let begins = |what: &[u8]| octets.iter().zip(what).all(|(octet, expected)| octet == expected);
    if begins(&SIGNATURE) {
        if octets.len() < FIXED { early(octets) } else { binary(octets) }
    } else if begins(LINE) {
        let line = &octets[..octets.len().min(LONGEST_LINE)];
        match line.iter().position(|octet| *octet == b'\n') {
            Some(end) => text(&line[..=end]).map(Some),
            None if line.len() == LONGEST_LINE => Err("a line that does not end"),
            None => Ok(None),
        }
    } else {
        Err("no PROXY header")
    }
}

/// What is wrong with version 2 as soon as it can be seen.
fn early(octets: &[u8]) -> Result<Option<Parsed>, Malformed> {
    match octets.get(SIGNATURE.len()) {
        None | Some(&(LOCAL | PROXY)) => Ok(None),
        Some(_) => Err("an unknown version or command"),
    }
}

fn binary(octets: &[u8]) -> Result<Option<Parsed>, Malformed> {
    early(octets)?;
    let (command, family) = (octets[12], octets[13]);
    let length = FIXED + usize::from(u16::from_be_bytes([octets[14], octets[15]]));
    if length > LONGEST {
        return Err("a header that is too long");
    }
    let addresses = match (command, family) {
        (LOCAL, _) => 0,
        (_, TCP_4) => 12,
        (_, TCP_6) => 36,
        _ => return Err("a client that is not of TCP"),
    };
    if length < FIXED + addresses {
        return Err("a header without room for its addresses");
    }
    if octets.len() < length {
        return Ok(None);
    }
    let addresses = &octets[FIXED..FIXED + addresses];
    let ends = match addresses.len() {
        12 => both::<4>(addresses),
        36 => both::<16>(addresses),
        _ => None,
    };
    Ok(Some(Parsed { length, ends }))
}

/// Two addresses of so many octets, and their ports.
fn both<const SIZE: usize>(octets: &[u8]) -> Option<[SocketAddr; 2]>
where
    IpAddr: From<[u8; SIZE]>,
{
    let (client, rest) = octets.split_first_chunk::<SIZE>()?;
    let (local, ports) = rest.split_first_chunk::<SIZE>()?;
    let port = |at: usize| Some(u16::from_be_bytes([*ports.get(at)?, *ports.get(at + 1)?]));
    Some([SocketAddr::new((*client).into(), port(0)?), SocketAddr::new((*local).into(), port(2)?)])
}

/// A line, its end included.
fn text(line: &[u8]) -> Result<Parsed, Malformed> {
    let length = line.len();
    let Some(words) = line.strip_suffix(b"\r\n").and_then(|line| line.strip_prefix(LINE)) else {
        return Err("a line without CRLF");
    };
    let Some(words) =
        core::str::from_utf8(words).ok().filter(|words| words.bytes().all(|octet| matches!(octet, b' '..=b'~')))
    else {
        return Err("a line that is no text");
    };
    // What may follow has no meaning.
    if words == "UNKNOWN" || words.starts_with("UNKNOWN ") {
        return Ok(Parsed { length, ends: None });
    }
    let mut words = words.split(' ');
    let ends = match words.next() {
        Some("TCP4") => ends::<Ipv4Addr>(&mut words),
        Some("TCP6") => ends::<Ipv6Addr>(&mut words),
        _ => return Err("a client that is not of TCP"),
    };
    match (ends, words.next()) {
        (Some(ends), None) => Ok(Parsed { length, ends: Some(ends) }),
        _ => Err("a line whose addresses are none"),
    }
}

fn ends<'a, A: FromStr + Into<IpAddr>>(words: &mut impl Iterator<Item = &'a str>) -> Option<[SocketAddr; 2]> {
    let mut address = || words.next()?.parse::<A>().ok().map(Into::into);
    let (client, local) = (address()?, address()?);
    let mut port = || {
        let word = words.next()?;
        let is_number = word.bytes().all(|octet| octet.is_ascii_digit()) && (word == "0" || !word.starts_with('0'));
        word.parse().ok().filter(|_: &u16| is_number)
    };
    Some([SocketAddr::new(client, port()?), SocketAddr::new(local, port()?)])
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::super::{Details, Header, Version};
    use super::*;

    /// What comes of it at each length is the same as octet by octet, because nothing is kept.
    fn parses_everywhere(header: &[u8], ends: Option<[SocketAddr; 2]>) {
        for more in [&b""[..], b"EHLO c.example\r\n", b"\n", b"\r\n\r\n\0\r\nQUIT\n"] {
            let octets = [header, more].concat();
            for length in 0..=octets.len() {
                let whole = (length >= header.len()).then_some(Parsed { length: header.len(), ends });
                assert_eq!(parse(&octets[..length]), Ok(whole), "{length} of {}", octets.escape_ascii());
            }
        }
    }

    fn v2(command: u8, family: u8, body: &[u8]) -> Vec<u8> {
        let length = u16::try_from(body.len()).unwrap().to_be_bytes();
        [&SIGNATURE[..], &[command, family], &length, body].concat()
    }

    fn two(client: &str, local: &str) -> Option<[SocketAddr; 2]> {
        Some([client.parse().unwrap(), local.parse().unwrap()])
    }

    #[test]
    fn lines_of_the_specification_are_heard() {
        for (line, ends) in [
            (
                "PROXY TCP4 255.255.255.255 255.255.255.255 65535 65535",
                two("255.255.255.255:65535", "255.255.255.255:65535"),
            ),
            ("PROXY TCP4 192.0.2.1 192.0.2.2 0 25", two("192.0.2.1:0", "192.0.2.2:25")),
            ("PROXY TCP6 2001:db8::1 ::1 4711 25", two("[2001:db8::1]:4711", "[::1]:25")),
            ("PROXY TCP6 ::ffff:192.0.2.1 ::ffff:192.0.2.2 1 2", two("[::ffff:192.0.2.1]:1", "[::ffff:192.0.2.2]:2")),
            ("PROXY UNKNOWN", None),
            ("PROXY UNKNOWN ffff:f...f:ffff ffff:f...f:ffff 65535 65535", None),
        ] {
            parses_everywhere(format!("{line}\r\n").as_bytes(), ends);
        }
        let longest = format!("PROXY UNKNOWN {}\r\n", "f".repeat(LONGEST_LINE - 16));
        parses_everywhere(longest.as_bytes(), None);
    }

    #[test]
    fn lines_that_are_none_are_refused() {
        for (line, why) in [
            ("EHLO c.example\r\n", "no PROXY header"),
            ("proxy TCP4 192.0.2.1 192.0.2.2 1 2\r\n", "no PROXY header"),
            ("\r\nPROXY UNKNOWN\r\n", "no PROXY header"),
            (" PROXY UNKNOWN\r\n", "no PROXY header"),
            ("PROXY\tUNKNOWN\r\n", "no PROXY header"),
            ("PROXY UNKNOWN\n", "a line without CRLF"),
            ("PROXY TCP4 192.0.2.1\n192.0.2.2 1 2\r\n", "a line without CRLF"),
            ("PROXY UNKNOWN\r\r\n", "a line that is no text"),
            ("PROXY TCP4 192.0.2.1 192.0.2.2 1 2\0\r\n", "a line that is no text"),
            ("PROXY UNKNOWNS\r\n", "a client that is not of TCP"),
            ("PROXY UDP4 192.0.2.1 192.0.2.2 1 2\r\n", "a client that is not of TCP"),
            ("PROXY  TCP4 192.0.2.1 192.0.2.2 1 2\r\n", "a client that is not of TCP"),
            ("PROXY TCP4\r\n", "a line whose addresses are none"),
            ("PROXY TCP4 192.0.2.1 192.0.2.2 1\r\n", "a line whose addresses are none"),
            ("PROXY TCP4 192.0.2.1 192.0.2.2 1 2 3\r\n", "a line whose addresses are none"),
            ("PROXY TCP4 192.0.2.1 192.0.2.2 1 2 \r\n", "a line whose addresses are none"),
            ("PROXY TCP4 192.0.2.1  192.0.2.2 1 2\r\n", "a line whose addresses are none"),
            ("PROXY TCP4 192.0.2.01 192.0.2.2 1 2\r\n", "a line whose addresses are none"),
            ("PROXY TCP4 2001:db8::1 ::1 1 2\r\n", "a line whose addresses are none"),
            ("PROXY TCP6 192.0.2.1 192.0.2.2 1 2\r\n", "a line whose addresses are none"),
            ("PROXY TCP6 fe80::1%eth0 ::1 1 2\r\n", "a line whose addresses are none"),
            ("PROXY TCP4 192.0.2.1 192.0.2.2 +1 2\r\n", "a line whose addresses are none"),
            ("PROXY TCP4 192.0.2.1 192.0.2.2 01 2\r\n", "a line whose addresses are none"),
            ("PROXY TCP4 192.0.2.1 192.0.2.2 65536 2\r\n", "a line whose addresses are none"),
            ("PROXY TCP4 192.0.2.1 192.0.2.2 1 -2\r\n", "a line whose addresses are none"),
            ("PROXY TCP4 mx.example 192.0.2.2 1 2\r\n", "a line whose addresses are none"),
        ] {
            assert_eq!(parse(line.as_bytes()), Err(why), "{line:?}");
        }
        let long = format!("PROXY UNKNOWN {}\r\n", "f".repeat(LONGEST_LINE - 15));
        assert_eq!(parse(long.as_bytes()), Err("a line that does not end"));
        assert_eq!(parse(&long.as_bytes()[..LONGEST_LINE - 1]), Ok(None));
        assert_eq!(parse(&long.as_bytes()[..LONGEST_LINE]), Err("a line that does not end"));
    }

    #[test]
    fn version_2_is_heard_with_what_else_it_says_and_a_health_check_without() {
        let four = b"\xc0\x00\x02\x01\xc6\x33\x64\x02\x12\x67\x00\x19";
        let ends = two("192.0.2.1:4711", "198.51.100.2:25");
        parses_everywhere(&v2(PROXY, TCP_4, four), ends);
        parses_everywhere(&v2(PROXY, TCP_4, &[&four[..], b"\x04\x00\x01x"].concat()), ends);
        parses_everywhere(&v2(LOCAL, 0, b""), None);
        parses_everywhere(&v2(LOCAL, TCP_4, four), None);
        parses_everywhere(&v2(LOCAL, 0x31, &[7; 300]), None);
        parses_everywhere(&v2(LOCAL, 0, &vec![7; LONGEST - FIXED]), None);
    }

    #[test]
    fn version_2_that_can_not_be_believed_is_refused_as_soon_as_it_is_seen() {
        for (header, why) in [
            (v2(0x11, TCP_4, &[0; 12]), "an unknown version or command"),
            (v2(0x22, TCP_4, &[0; 12]), "an unknown version or command"),
            (v2(PROXY, 0x00, &[0; 12]), "a client that is not of TCP"),
            (v2(PROXY, 0x12, &[0; 12]), "a client that is not of TCP"),
            (v2(PROXY, 0x31, &[0; 216]), "a client that is not of TCP"),
            (v2(PROXY, TCP_4, &[0; 11]), "a header without room for its addresses"),
            (v2(PROXY, TCP_6, &[0; 35]), "a header without room for its addresses"),
            (v2(LOCAL, 0, &vec![0; LONGEST - FIXED + 1]), "a header that is too long"),
        ] {
            assert_eq!(parse(&header), Err(why));
            assert_eq!(parse(&header[..FIXED]), Err(why), "the rest need not come");
        }
        assert_eq!(parse(b"\r\n\r\n\0\r\nQUIT\n\x51"), Err("an unknown version or command"));
        assert_eq!(parse(b"\r\n\r\n\0\r\nEHLO"), Err("no PROXY header"));
    }

    fn address(is_ipv4: bool) -> impl Strategy<Value = SocketAddr> {
        (any::<u128>(), any::<u16>()).prop_map(move |(bits, port)| {
            let ip: IpAddr =
                if is_ipv4 { Ipv4Addr::from_bits(bits as u32).into() } else { Ipv6Addr::from_bits(bits).into() };
            SocketAddr::new(ip, port)
        })
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(
            (client, local) in any::<bool>().prop_flat_map(|is_ipv4| (address(is_ipv4), address(is_ipv4))),
            is_v1 in any::<bool>(),
            tls in any::<bool>(),
            name in proptest::option::of("[a-z]{1,60}"),
        ) {
            let version = if is_v1 { Version::V1 } else { Version::V2 };
            let header = Header { version, client, local, tls };
            let details = Details { version: "TLSv1.3", suite: "TLS_AES_128_GCM_SHA256", server_name: name.as_deref(), protocol: None };
            let octets = header.octets(Some(&details));
            let canonical = |end: SocketAddr| (end.ip().to_canonical(), end.port());
            let parsed = parse(&octets).unwrap().unwrap();
            prop_assert_eq!(parsed.length, octets.len());
            prop_assert_eq!(parsed.ends.unwrap().map(canonical), [client, local].map(canonical));
        }

        #[test]
        fn nothing_makes_it_panic_and_no_answer_is_taken_back(octets in mutated()) {
            let mut last = Ok(None);
            for length in 0..=octets.len() {
                let now = parse(&octets[..length]);
                if let Ok(Some(parsed)) = now {
                    prop_assert!(parsed.length <= length);
                }
                if last != Ok(None) {
                    prop_assert_eq!(now, last, "at {}", length);
                }
                last = now;
            }
        }
    }

    /// Headers in which a few octets are others.
    fn mutated() -> impl Strategy<Value = Vec<u8>> {
        let seeds = prop_oneof![
            Just(b"PROXY TCP4 192.0.2.1 192.0.2.2 4711 25\r\nEHLO c\r\n".to_vec()),
            Just(b"PROXY TCP6 2001:db8::1 ::1 4711 25\r\nEHLO c\r\n".to_vec()),
            Just(v2(PROXY, TCP_4, &[7; 20])),
            Just(v2(PROXY, TCP_6, &[7; 40])),
        ];
        (seeds, proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4)).prop_map(
            |(mut octets, changes)| {
                for (at, octet) in changes {
                    let at = at.index(octets.len());
                    octets[at] = octet;
                }
                octets
            },
        )
    }
}
