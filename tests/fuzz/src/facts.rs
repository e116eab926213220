//! Target: what others are told of the client: the PROXY header, read again by the specification (haproxy's proxy-protocol.txt, 2.1 and
//! 2.2) and by nothing of src/proxy.rs; and the variables of its TLS, from a writer who is trusted with nothing.

use std::net::{IpAddr, SocketAddr};

use starttls_wrapper::proxy::{Details, Header, Version};
use starttls_wrapper::variables::{MOST, decode, encode, is_whole};

/// What a client may call the server it wants (RFC 1035), and what else is of this length at most.
const NAME: usize = 255;

/// One input: the first octet chooses, addresses and ports follow, and then the words, up to a NUL each. As a whole it is variables too.
pub fn run(octets: &[u8]) {
    variables(octets);
    let Some((header, details)) = chosen(octets) else { return };
    let (version, client, local) = (header.version, header.client, header.local);
    let said = header.octets(details.as_ref());
    match version {
        Version::V1 => {
            assert_eq!(read_line(&said), Some([client, local].map(canonical)), "\"{}\"", said.escape_ascii())
        }
        Version::V2 => {
            let read = read_binary(&said).unwrap_or_else(|| panic!("no header: \"{}\"", said.escape_ascii()));
            assert_eq!(read.ends, [client, local].map(canonical));
            check_tlvs(&read.tlvs, &header, details.as_ref());
        }
    }
}

/// What the octets want to be told of whom.
pub(crate) fn chosen(octets: &[u8]) -> Option<(Header, Option<Details<'_>>)> {
    let (choice, rest) = octets.split_first()?;
    let (ends, rest) = rest.split_first_chunk::<36>()?;
    let [client, local] = [(choice & 1, &ends[..18]), (choice & 2, &ends[18..])].map(|(is_ipv4, end)| {
        let port = u16::from_be_bytes([end[16], end[17]]);
        let ip = match (is_ipv4 != 0, end.first_chunk::<4>(), end.first_chunk::<16>()) {
            (true, Some(ip), _) => IpAddr::from(*ip),
            (_, _, Some(ip)) => IpAddr::from(*ip),
            _ => unreachable!(),
        };
        SocketAddr::new(ip, port)
    });
    let version = if choice & 4 == 0 { Version::V1 } else { Version::V2 };
    let header = Header { version, client, local, tls: choice & 8 != 0 };
    let words: Vec<&[u8]> = rest.split(|octet| *octet == 0).map(|word| &word[..word.len().min(NAME)]).collect();
    let word = |number: usize| words.get(number).copied();
    let text = |number| word(number).and_then(|word| core::str::from_utf8(word).ok());
    let details = (choice & 16 != 0).then(|| Details {
        version: text(0).unwrap_or("TLSv1.3"),
        suite: text(1).unwrap_or("TLS_AES_128_GCM_SHA256"),
        server_name: text(2),
        protocol: word(3),
    });
    Some((header, details))
}

/// An address as both sides may write it.
pub(crate) fn canonical(end: SocketAddr) -> SocketAddr {
    SocketAddr::new(end.ip().to_canonical(), end.port())
}

/// Version 1: a line of at most 107 octets.
fn read_line(said: &[u8]) -> Option<[SocketAddr; 2]> {
    let line = core::str::from_utf8(said).ok().filter(|line| line.len() <= 107)?.strip_suffix("\r\n")?;
    let [signature, family, client, local, from, to] = line.split(' ').collect::<Vec<_>>()[..] else { return None };
    let ends =
        [(client, from), (local, to)].map(|(ip, port)| Some(SocketAddr::new(ip.parse().ok()?, port.parse().ok()?)));
    let ends = [ends[0]?, ends[1]?];
    let is_family = |end: &SocketAddr| end.is_ipv4() == (family == "TCP4");
    let is_it = signature == "PROXY" && matches!(family, "TCP4" | "TCP6") && ends.iter().all(is_family);
    is_it.then_some(ends.map(canonical))
}

struct Binary {
    ends: [SocketAddr; 2],
    tlvs: Vec<(u8, Vec<u8>)>,
}

fn read_binary(said: &[u8]) -> Option<Binary> {
    let rest = said.strip_prefix(b"\x0d\x0a\x0d\x0a\x00\x0d\x0aQUIT\x0a\x21")?;
    let (&family, rest) = rest.split_first()?;
    let (length, body) = rest.split_first_chunk::<2>()?;
    if usize::from(u16::from_be_bytes(*length)) != body.len() {
        return None;
    }
    let (ips, body): (Vec<IpAddr>, _) = match family {
        0x11 => (
            body.get(..8)?.chunks(4).filter_map(|ip| Some(IpAddr::from(*ip.first_chunk::<4>()?))).collect(),
            &body[8..],
        ),
        0x21 => (
            body.get(..32)?.chunks(16).filter_map(|ip| Some(IpAddr::from(*ip.first_chunk::<16>()?))).collect(),
            &body[32..],
        ),
        _ => return None,
    };
    let (ports, body) = body.split_first_chunk::<4>()?;
    let ends =
        [(ips[0], 0), (ips[1], 2)].map(|(ip, at)| SocketAddr::new(ip, u16::from_be_bytes([ports[at], ports[at + 1]])));
    Some(Binary { ends: ends.map(canonical), tlvs: read_tlvs(body)? })
}

/// Type, length, value, until nothing is left.
fn read_tlvs(mut octets: &[u8]) -> Option<Vec<(u8, Vec<u8>)>> {
    let mut tlvs = Vec::new();
    while let Some((&kind, rest)) = octets.split_first() {
        let (length, rest) = rest.split_first_chunk::<2>()?;
        let length = usize::from(u16::from_be_bytes(*length));
        tlvs.push((kind, rest.get(..length)?.to_vec()));
        octets = &rest[length..];
    }
    Some(tlvs)
}

fn check_tlvs(tlvs: &[(u8, Vec<u8>)], header: &Header, details: Option<&Details<'_>>) {
    let of = |kind: u8| tlvs.iter().filter(move |(one, _)| *one == kind).map(|(_, value)| value.as_slice());
    let known = details.filter(|_| header.tls);
    assert_eq!(of(0x01).collect::<Vec<_>>(), Vec::from_iter(known.and_then(|known| known.protocol)));
    assert_eq!(
        of(0x02).collect::<Vec<_>>(),
        Vec::from_iter(known.and_then(|known| known.server_name.map(str::as_bytes)))
    );
    let ssl: Vec<_> = of(0x20).collect();
    assert_eq!(ssl.len(), usize::from(header.tls));
    let Some((client, inner)) = ssl.first().and_then(|ssl| ssl.split_first_chunk::<5>()) else {
        assert!(!header.tls && tlvs.is_empty());
        return;
    };
    // PP2_CLIENT_SSL, and a certificate that was not verified, for there was none.
    assert_eq!(*client, [1, 0, 0, 0, 1]);
    let inner = read_tlvs(inner).unwrap_or_else(|| panic!("{inner:?}"));
    assert_eq!(
        inner.iter().map(|(kind, _)| *kind).collect::<Vec<_>>(),
        if known.is_some() { vec![0x21, 0x23] } else { vec![] }
    );
    if let (Some(known), Some((_, version))) = (known, inner.first()) {
        assert_eq!(version, known.version.as_bytes());
    }
}

/// What anybody may write, and what becomes of it.
fn variables(octets: &[u8]) {
    let told = decode(octets);
    for (name, value) in &told {
        let is_name =
            name.starts_with("SSL_") && name.bytes().all(|o| o.is_ascii_uppercase() || o.is_ascii_digit() || o == b'_');
        assert!(is_name && !["SSL_CERT_FILE", "SSL_CERT_DIR"].contains(&name.as_str()), "{name:?}");
        assert!(!value.iter().any(|octet| octet.is_ascii_control()), "{name}={}", value.escape_ascii());
        assert!(
            octets.windows(name.len() + value.len() + 1).any(|part| part == [name.as_bytes(), b"=", value].concat())
        );
    }
    let again = encode(told.iter().map(|(name, value)| (name.as_str(), value.as_slice())));
    assert!(is_whole(&again) && again.len() <= MOST, "{} octets", again.len());
    assert!((1..again.len()).all(|cut| !is_whole(&again[..cut])), "its end is in the middle: {again:?}");
    let read = decode(&again);
    let mut left = told.iter();
    assert!(read.iter().all(|one| left.any(|other| one == other)), "{told:?} became {read:?}");
    let size = told.iter().map(|(name, value)| name.len() + value.len() + 2).sum::<usize>();
    assert!(size >= MOST || read == told, "{told:?} became {read:?}");
}
