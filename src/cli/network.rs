//! Networks as they are written: an address, or with a slash how many of its leading bits are the network's (RFC 4632 3.1, RFC 4291 2.3).

use core::net::IpAddr;
use core::str::FromStr;

/// Addresses whose first bits are these.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Network {
    address: IpAddr,
    bits: u32,
}

impl Network {
    /// Whether it has this address. IPv4 in IPv6 is IPv4.
    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        match (self.address, address.to_canonical()) {
            (IpAddr::V4(own), IpAddr::V4(other)) => agree(own.to_bits().into(), other.to_bits().into(), 32 - self.bits),
            (IpAddr::V6(own), IpAddr::V6(other)) => agree(own.to_bits(), other.to_bits(), 128 - self.bits),
            (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => false,
        }
    }
}

/// Whether they differ at most in so many of their last bits.
fn agree(one: u128, other: u128, last: u32) -> bool {
    (one ^ other).checked_shr(last).unwrap_or(0) == 0
}

impl FromStr for Network {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (address, bits) = match text.split_once('/') {
            Some((address, bits)) => (address, Some(bits)),
            None => (text, None),
        };
        let Ok(address) = address.parse::<IpAddr>() else { return Err("no network") };
        if address != address.to_canonical() {
            return Err("IPv4 in IPv6: write it as IPv4");
        }
        let most = if address.is_ipv4() { 32 } else { 128 };
        let number = |bits: &str| bits.parse::<u32>().ok().filter(|_| bits.bytes().all(|octet| octet.is_ascii_digit()));
        let bits = match bits.map(number) {
            None => most,
            Some(Some(bits)) if bits <= most => bits,
            Some(_) => return Err("no network"),
        };
        let rest = match address {
            IpAddr::V4(address) => u128::from(address.to_bits()),
            IpAddr::V6(address) => address.to_bits(),
        };
        // It may be that the address is meant, or the network: two very different things to trust.
        if bits < most && rest & (u128::MAX >> (128 - (most - bits))) != 0 {
            return Err("an address with bits behind its network");
        }
        Ok(Self { address, bits })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_network_has_its_addresses_and_no_others() {
        for (network, has, has_not) in [
            (
                "192.0.2.0/24",
                vec!["192.0.2.0", "192.0.2.255", "::ffff:192.0.2.7"],
                vec!["192.0.3.0", "192.0.1.255", "::1"],
            ),
            ("192.0.2.1", vec!["192.0.2.1"], vec!["192.0.2.0", "192.0.2.2"]),
            ("192.0.2.1/32", vec!["192.0.2.1"], vec!["192.0.2.0"]),
            ("128.0.0.0/1", vec!["255.1.2.3"], vec!["127.255.255.255"]),
            ("0.0.0.0/0", vec!["1.2.3.4", "255.255.255.255"], vec!["::", "2001:db8::1"]),
            ("::/0", vec!["::", "ffff::"], vec!["1.2.3.4", "::ffff:1.2.3.4"]),
            ("2001:db8::/33", vec!["2001:db8:7fff::1"], vec!["2001:db8:8000::", "2001:db7::"]),
            ("::1", vec!["::1"], vec!["::2", "0.0.0.1"]),
        ] {
            let parsed: Network = network.parse().unwrap();
            for (address, expected) in has.iter().map(|a| (a, true)).chain(has_not.iter().map(|a| (a, false))) {
                assert_eq!(parsed.contains(address.parse().unwrap()), expected, "{network} {address}");
            }
        }
    }

    #[test]
    fn what_is_ambiguous_or_none_is_refused() {
        for text in [
            "",
            "/8",
            "10.0.0.0/",
            "10.0.0.0/33",
            "10.0.0.0/+8",
            "::/129",
            "10/8",
            "mx.example",
            "10.0.0.0/8/8",
            "10.0.0.0/ 8",
        ] {
            assert_eq!(text.parse::<Network>(), Err("no network"), "{text:?}");
        }
        for text in ["10.0.0.1/8", "0.0.0.1/0", "2001:db8::1/64", "192.0.2.2/30"] {
            assert_eq!(text.parse::<Network>(), Err("an address with bits behind its network"), "{text:?}");
        }
        assert_eq!("::ffff:10.0.0.0/104".parse::<Network>(), Err("IPv4 in IPv6: write it as IPv4"));
    }
}
