//! What is known of the client's TLS, as environment variables for PROG, in skarnet's names; and how they travel to the process
//! that becomes PROG: `NAME=VALUE` and a NUL each, a NUL behind all, as UCSPI-TLS servers send theirs.
//!
//! Contract: whoever reads them trusts the writer with nothing. Names begin with `SSL_` and are none that libraries take orders
//! from, values hold no control characters, and all together are at most [`MOST`] octets, which a pipe takes in one write.

/// What s6-tlsd tells its program of every session; each is taken out of PROG's environment where it is not known.
pub const NAMES: [&str; 3] = ["SSL_PROTOCOL", "SSL_CIPHER", "SSL_TLS_SNI_SERVERNAME"];

/// The most that all of them take: PIPE_BUF (pipe(7)).
pub const MOST: usize = 4096;

/// Whom OpenSSL and others trust: not for a stranger to say.
const ORDERS: [&[u8]; 2] = [b"SSL_CERT_FILE", b"SSL_CERT_DIR"];

/// One variable.
pub type Variable = (String, Vec<u8>);

/// The octets for these variables. What may not be told, or finds no room, is left out.
#[must_use]
pub fn encode<'a>(variables: impl IntoIterator<Item = (&'a str, &'a [u8])>) -> Vec<u8> {
    let mut octets = Vec::with_capacity(256);
    for (name, value) in variables {
        let length = name.len() + 1 + value.len() + 1;
        if may_be_told(name.as_bytes(), value) && octets.len() + length < MOST {
            octets.extend_from_slice(name.as_bytes());
            octets.push(b'=');
            octets.extend_from_slice(value);
            octets.push(0);
        }
    }
    octets.push(0);
    octets
}

/// Whether the octets are all that will come.
#[must_use]
pub fn is_whole(octets: &[u8]) -> bool {
    octets.ends_with(&[0, 0]) || octets == [0]
}

/// The variables in these octets. What may not be told is left out.
#[must_use]
pub fn decode(octets: &[u8]) -> Vec<Variable> {
    let words = octets.split(|octet| *octet == 0);
    let variable = |word: &[u8]| {
        let at = word.iter().position(|octet| *octet == b'=')?;
        let (name, value) = (&word[..at], &word[at + 1..]);
        let name = core::str::from_utf8(name).ok().filter(|_| may_be_told(name, value))?;
        Some((name.to_owned(), value.to_vec()))
    };
    words.filter_map(variable).collect()
}

fn may_be_told(name: &[u8], value: &[u8]) -> bool {
    let is_letter = |octet: &u8| octet.is_ascii_uppercase() || octet.is_ascii_digit() || *octet == b'_';
    name.starts_with(b"SSL_")
        && name.iter().all(is_letter)
        && !ORDERS.contains(&name)
        && !value.iter().any(u8::is_ascii_control)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn through(variables: &[(&str, &str)]) -> Vec<(String, String)> {
        let octets = encode(variables.iter().map(|(name, value)| (*name, value.as_bytes())));
        assert!(is_whole(&octets) && octets.len() <= MOST, "{octets:?}");
        assert!((1..octets.len()).all(|cut| !is_whole(&octets[..cut])), "{octets:?}");
        decode(&octets).into_iter().map(|(name, value)| (name, String::from_utf8(value).unwrap())).collect()
    }

    #[test]
    fn what_is_known_arrives() {
        let known = [("SSL_PROTOCOL", "TLSv1.3"), ("SSL_TLS_SNI_SERVERNAME", "mx.example"), ("SSL_CIPHER", "")];
        assert_eq!(through(&known), known.map(|(name, value)| (name.to_owned(), value.to_owned())));
        assert_eq!(through(&[]), []);
    }

    #[test]
    fn nobody_gives_prog_orders_by_them() {
        for (name, value) in [
            ("PATH", "/tmp"),
            ("LD_PRELOAD", "/tmp/x"),
            ("RELAYCLIENT", ""),
            ("SSL_CERT_FILE", "/tmp/x"),
            ("SSL_cipher", "x"),
            ("SSL_CIPHER", "a\nb"),
            ("SSL_CIPHER\0PATH", "x"),
            ("SSL_=", "x"),
        ] {
            let octets = [name.as_bytes(), b"=", value.as_bytes(), b"\0\0"].concat();
            let told: Vec<String> = decode(&octets).into_iter().map(|(name, _)| name).collect();
            assert!(!told.iter().any(|told| told == name), "{name}: {told:?}");
            if name != "SSL_=" {
                assert_eq!(through(&[(name, value)]), [], "{name}");
            }
        }
    }

    #[test]
    fn too_much_is_left_out() {
        let long = "x".repeat(MOST);
        assert_eq!(through(&[("SSL_CIPHER", &long), ("SSL_PROTOCOL", "p")]).len(), 1);
        let many = vec![("SSL_CIPHER", &long[..100]); 100];
        assert_eq!(through(&many).len(), 36);
    }
}
