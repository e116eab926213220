//! PEM (RFC 7468): the sections of a text, decoded only where they are wanted, so that no copy of a key stays behind.
//!
//! Rejected: rustls-pki-types' reader. It collects the base64 in a buffer that it frees unwiped, and decodes every section, so that of
//! a certificate's file that holds the key too a second copy stays behind.

use zeroize::Zeroizing;

/// A section's label (`CERTIFICATE`) and its base64 text.
pub(super) struct Section<'a> {
    pub(super) label: &'a [u8],
    body: &'a [u8],
}

/// The sections of `text`, in order; what stands between them is skipped. An error says what is damaged, quotes nothing, and is the
/// last item.
pub(super) fn sections(text: &[u8]) -> Sections<'_> {
    Sections { rest: text }
}

pub(super) struct Sections<'a> {
    rest: &'a [u8],
}

impl<'a> Sections<'a> {
    /// The next line, without blanks and line end behind it.
    fn line(&mut self) -> Option<&'a [u8]> {
        if self.rest.is_empty() {
            return None;
        }
        let end = self.rest.iter().position(|&octet| octet == b'\n').map_or(self.rest.len(), |at| at + 1);
        let (line, rest) = self.rest.split_at(end);
        self.rest = rest;
        Some(line.trim_ascii_end())
    }
}

impl<'a> Iterator for Sections<'a> {
    type Item = Result<Section<'a>, &'static str>;

    fn next(&mut self) -> Option<Self::Item> {
        let begun = loop {
            if let Some(begun) = self.line()?.strip_prefix(b"-----BEGIN ") {
                break begun;
            }
        };
        let Some(label) = begun.strip_suffix(b"-----") else {
            self.rest = &[];
            return Some(Err("damaged PEM BEGIN line"));
        };
        let from = self.rest;
        loop {
            let left = self.rest.len();
            let Some(line) = self.line() else { return Some(Err("PEM section without its END line")) };
            let ended = line.strip_prefix(b"-----END ").and_then(|rest| rest.strip_suffix(b"-----"));
            if ended == Some(label) {
                return Some(Ok(Section { label, body: &from[..from.len() - left] }));
            }
        }
    }
}

impl Section<'_> {
    /// Whether a passphrase protects it: a label of PKCS #8 (RFC 7468 11), or a header of the older format (RFC 1421 4.6.1.1).
    pub(super) fn is_encrypted(&self) -> bool {
        self.label == b"ENCRYPTED PRIVATE KEY" || self.body.starts_with(b"Proc-Type: 4,ENCRYPTED")
    }

    /// The section's octets, in one allocation that never grew, so that wiping it leaves nothing.
    pub(super) fn decode(&self) -> Result<Zeroizing<Vec<u8>>, &'static str> {
        base64(self.body).ok_or("damaged base64 in a PEM section")
    }
}

/// The octets of a base64 text, blanks and line ends left out, in one allocation that never grew. `None`: it is damaged.
pub(super) fn base64(text: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
    let mut octets = Zeroizing::new(Vec::with_capacity(text.len() / 4 * 3 + 3));
    let (mut bits, mut held, mut digits, mut padding) = (0_u32, 0, 0_usize, 0_usize);
    for &digit in text.iter().filter(|octet| !octet.is_ascii_whitespace()) {
        digits += 1;
        if digit == b'=' {
            padding += 1;
            continue;
        }
        let sextet = u32::try_from(sextet(digit)).ok()?;
        if padding > 0 {
            return None;
        }
        bits = bits << 6 | sextet;
        held += 6;
        if held >= 8 {
            held -= 8;
            octets.push((bits >> held) as u8);
        }
    }
    // RFC 4648 3.5: what is left over is padded, and zero.
    let is_whole = digits % 4 == 0 && padding == held / 2 && bits & ((1 << held) - 1) == 0;
    is_whole.then_some(octets)
}

/// The six bits of a base64 digit (RFC 4648 4), or -1. No branch and no look-up depends on the digit: it may be a key's.
fn sextet(digit: u8) -> i16 {
    let digit = i16::from(digit);
    // All ones where the digit lies in the range, else zero.
    let within = |first: u8, last: u8| ((i16::from(first) - 1 - digit) & (digit - i16::from(last) - 1)) >> 8;
    let value = |first: u8, last: u8, of_first: i16| within(first, last) & (digit - i16::from(first) + of_first + 1);
    value(b'A', b'Z', 0) + value(b'a', b'z', 26) + value(b'0', b'9', 52) + value(b'+', b'+', 62) + value(b'/', b'/', 63)
        - 1
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn decoded(body: &str) -> Result<Vec<u8>, &'static str> {
        Section { label: b"X", body: body.as_bytes() }.decode().map(|octets| octets.to_vec())
    }

    #[test]
    fn every_digit_has_its_value_and_nothing_else_has_one() {
        let alphabet = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
        for octet in 0..=255 {
            let place = alphabet.iter().position(|&digit| digit == octet).map_or(-1, |at| at as i16);
            assert_eq!(sextet(octet), place, "{octet}");
        }
    }

    #[test]
    fn decodes_the_vectors_of_rfc_4648() {
        for (text, octets) in [
            ("", ""),
            ("Zg==", "f"),
            ("Zm8=", "fo"),
            ("Zm9v", "foo"),
            ("Zm9v\r\nYg==\n", "foob"),
            ("Zm9vYmE=", "fooba"),
        ] {
            assert_eq!(decoded(text).unwrap(), octets.as_bytes());
        }
    }

    #[test]
    fn refuses_base64_that_is_cut_or_continued() {
        for text in
            ["Z", "Zg", "Zg=", "Zm8", "Zm9vY", "Zh==", "Zm9=", "Zg==Zg==", "====", "Zm9v====", "Zm9!", "Zm9v: x"]
        {
            assert!(decoded(text).is_err(), "{text}");
        }
    }

    #[test]
    fn never_outgrows_its_first_allocation() {
        for length in 0..300 {
            let text = ["QUJD".repeat(length), "\n".to_owned()].concat();
            let section = Section { label: b"X", body: text.as_bytes() };
            let octets = section.decode().unwrap();
            assert!(octets.capacity() <= text.len() / 4 * 3 + 3, "{length}");
        }
    }

    #[test]
    fn finds_sections_between_other_text_and_names_the_damage() {
        let text = b"Bag Attributes\r\n-----BEGIN A B-----\r\nZm9v\r\n-----END A B-----\r\nx\n-----BEGIN C-----\n-----END C-----";
        let found: Vec<_> = sections(text).map(|section| section.unwrap().label.to_vec()).collect();
        assert_eq!(found, [b"A B".to_vec(), b"C".to_vec()]);
        for damaged in [
            "-----BEGIN A----\nZm9v\n-----END A-----",
            "-----BEGIN A-----\nZm9v\n",
            "-----BEGIN A-----\n-----END B-----",
        ] {
            assert!(sections(damaged.as_bytes()).any(|section| section.is_err()), "{damaged}");
        }
    }
}
