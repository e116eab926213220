//! Target: the PROXY header that a load balancer sends before a client's octets, read again by the specification (haproxy's
//! proxy-protocol.txt, 2.1 and 2.2) and by nothing of src/proxy/parse.rs.
//!
//! A header is found as soon as it is whole, with every cut, and what follows it changes nothing; what is none stays none; neither wants
//! more than [`LONGEST`] octets to be told. The same octets as addresses and words, as the target [`facts`] has them: what our own
//! writer makes of them is heard as it was meant.

use std::net::{IpAddr, SocketAddr};

use starttls_wrapper::proxy::{LONGEST, parse};

use super::facts;

/// A line of version 1 with its CRLF (2.1).
const LONGEST_LINE: usize = 107;
/// What the client may say behind its header.
const BEHIND: [&[u8]; 4] = [b"EHLO c.example\r\n", b"\n", b"\r\n\r\n\0\r\nQUIT\n!\x11\0\x0c", b" 1\r\n"];

type Ends = Option<[SocketAddr; 2]>;

/// One input.
pub fn run(octets: &[u8]) {
    heard(octets);
    let Some((header, details)) = facts::chosen(octets) else { return };
    let said = header.octets(details.as_ref());
    let ends = heard(&said).unwrap_or_else(|| panic!("ours is none: \"{}\"", said.escape_ascii()));
    assert_eq!(ends.map(canonical), Some([header.client, header.local].map(facts::canonical)));
}

/// What the octets say, where all of them begin with a header.
fn heard(octets: &[u8]) -> Option<Ends> {
    let expected = read(octets);
    let whole = expected.map_or(octets.len(), |(length, _)| length);
    let mut refused = None;
    // Each cut where something may happen, and some where nothing should.
    for cut in (0..=octets.len()).filter(|cut| *cut <= 256 || cut.is_multiple_of(61) || cut.abs_diff(whole) <= 2) {
        let shown = || format!("{cut} of \"{}\"", octets.escape_ascii());
        match (parse(&octets[..cut]), expected) {
            (Ok(Some(parsed)), Some((length, ends))) => {
                assert!(length <= cut, "more than there was: {}", shown());
                assert_eq!((parsed.length, parsed.ends), (length, ends), "{}", shown());
            }
            (Ok(Some(parsed)), None) => panic!("{parsed:?}: {}", shown()),
            (Ok(None), _) => {
                assert!(refused.is_none(), "none, and then one: {}", shown());
                assert!(expected.is_none_or(|(length, _)| cut < length), "not yet: {}", shown());
                assert!(may_become(&octets[..cut]), "{}", shown());
            }
            (Err(why), expected) => {
                assert!(expected.is_none(), "{why}: {}", shown());
                assert!(refused.is_none_or(|before| before == why), "{why}, not {refused:?}: {}", shown());
                refused = Some(why);
            }
        }
    }
    let (length, ends) = expected?;
    for more in BEHIND {
        let parsed = parse(&[&octets[..length], more].concat());
        assert!(matches!(parsed, Ok(Some(parsed)) if (parsed.length, parsed.ends) == (length, ends)), "{parsed:?}");
    }
    Some(ends)
}

/// A header at the beginning: its length, and its ends.
fn read(octets: &[u8]) -> Option<(usize, Ends)> {
    if octets.starts_with(b"PROXY ") { read_line(octets) } else { read_binary(octets) }
}

fn read_line(octets: &[u8]) -> Option<(usize, Ends)> {
    let length = octets.windows(2).position(|two| two == b"\r\n")? + 2;
    let line = core::str::from_utf8(&octets[..length - 2]).ok().filter(|_| length <= LONGEST_LINE)?;
    let words: Vec<&str> = line.split(' ').collect();
    if !line.bytes().all(|octet| octet == b' ' || octet.is_ascii_graphic()) {
        return None;
    }
    if words[1] == "UNKNOWN" {
        return Some((length, None));
    }
    let [_, family, client, local, from, to] = words[..] else { return None };
    let end = |ip: &str, port: &str| {
        let end = SocketAddr::new(ip.parse().ok()?, port.parse().ok()?);
        let is_family = family == if end.is_ipv4() { "TCP4" } else { "TCP6" };
        // No sign and no leading zero; IPv6 has more than one spelling.
        let is_spelt = end.port().to_string() == port && (end.is_ipv6() || end.ip().to_string() == ip);
        (is_family && is_spelt).then_some(end)
    };
    Some((length, Some([end(client, from)?, end(local, to)?])))
}

fn read_binary(octets: &[u8]) -> Option<(usize, Ends)> {
    let rest = octets.strip_prefix(b"\x0d\x0a\x0d\x0a\x00\x0d\x0a\x51\x55\x49\x54\x0a")?;
    let (&[command, family, high, low], rest) = rest.split_first_chunk::<4>()?;
    let body = rest.get(..usize::from(high) << 8 | usize::from(low))?;
    let length = 16 + body.len();
    let number = |at: usize, octets: usize| body.get(at..at + octets);
    let end = |ip: &[u8], port: &[u8]| {
        let ip = match *ip {
            [a, b, c, d] => IpAddr::from([a, b, c, d]),
            _ => IpAddr::from(<[u8; 16]>::try_from(ip).ok()?),
        };
        Some(SocketAddr::new(ip, u16::from_be_bytes(port.try_into().ok()?)))
    };
    let ends = match (command, family) {
        (0x20, _) => None,
        (0x21, 0x11) => Some([end(number(0, 4)?, number(8, 2)?)?, end(number(4, 4)?, number(10, 2)?)?]),
        (0x21, 0x21) => Some([end(number(0, 16)?, number(32, 2)?)?, end(number(16, 16)?, number(34, 2)?)?]),
        _ => return None,
    };
    (length <= LONGEST).then_some((length, ends))
}

/// These octets are worth waiting behind: a line is not at its end, or a body has not come, and either is soon too long.
fn may_become(octets: &[u8]) -> bool {
    let has_begun = |what: &[u8]| octets.iter().zip(what).all(|(one, other)| one == other);
    let line = has_begun(b"PROXY ") && octets.len() < LONGEST_LINE && !octets.contains(&b'\n');
    let binary = has_begun(b"\r\n\r\n\0\r\nQUIT\n")
        && octets.get(12).is_none_or(|command| matches!(command, 0x20 | 0x21))
        && octets.len() < LONGEST
        && octets.get(14..16).is_none_or(|length| {
            let length = 16 + (usize::from(length[0]) << 8) + usize::from(length[1]);
            octets.len() < length && length <= LONGEST
        });
    line || binary
}

fn canonical(ends: [SocketAddr; 2]) -> [SocketAddr; 2] {
    ends.map(facts::canonical)
}
