//! A second reading of protocol.md, Snoop 2: how a client's stream falls into lines. Looks at the whole stream at once, holds
//! no state, and shares nothing with `src/smtp/line.rs` but the limit.

use starttls_wrapper::smtp::line::{Fault, LIMIT};

/// A piece of the stream up to an LF, or what stands behind the last one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Line<'a> {
    /// The octets, line end included.
    pub raw: &'a [u8],
    /// Whether its LF is there.
    pub whole: bool,
}

impl<'a> Line<'a> {
    /// Without its line end.
    #[must_use]
    pub fn text(&self) -> &'a [u8] {
        let text = self.raw.strip_suffix(b"\n").unwrap_or(self.raw);
        if self.whole { text.strip_suffix(b"\r").unwrap_or(text) } else { text }
    }

    /// As a server must get it.
    #[must_use]
    pub fn normal(&self) -> Vec<u8> {
        [self.text(), b"\r\n"].concat()
    }

    /// What is wrong with a whole line: a NUL or a stray CR within the limit comes before the length.
    #[must_use]
    pub fn fault(&self) -> Option<Fault> {
        let within = &self.raw[..self.raw.len().min(LIMIT)];
        let bad = within.iter().enumerate().any(|(at, &octet)| {
            octet == 0 || octet == b'\r' && at + 1 < LIMIT && self.raw.get(at + 1).is_some_and(|&next| next != b'\n')
        });
        match bad {
            true => Some(Fault::BadOctet),
            false if self.raw.len() > LIMIT => Some(Fault::TooLong),
            false => None,
        }
    }

    /// Leading blanks and verb, where a blank behind them proves that the verb is whole.
    #[must_use]
    pub fn head(&self) -> Option<&'a [u8]> {
        let blank = |octet: &u8| matches!(octet, b' ' | b'\t');
        let lead = self.raw.iter().position(|octet| !blank(octet))?;
        let end = lead + self.raw[lead..].iter().position(|o| blank(o) || matches!(o, b'\n' | b'\r' | 0))?;
        (blank(&self.raw[end]) && end < LIMIT).then(|| &self.raw[..end])
    }
}

/// The lines of `stream`; the last one may not be whole.
pub fn lines(stream: &[u8]) -> impl Iterator<Item = Line<'_>> {
    stream.split_inclusive(|octet| *octet == b'\n').map(|raw| Line { raw, whole: raw.ends_with(b"\n") })
}

/// Whether a server that got `got` got `stream` by the rules: some of its lines in order, each as [`Line::normal`] has it, and
/// then, if `tail`, all of it from the beginning of some line on, octet for octet.
#[must_use]
pub fn accounts_for(stream: &[u8], got: &[u8], tail: bool) -> bool {
    let mut boundary = 0;
    let mut said = 0;
    // Greedy: each line of the stream is taken off `got` if it stands there. At each boundary the rest may be the tail.
    for line in lines(stream) {
        if tail && got[said..] == stream[boundary..] {
            return true;
        }
        boundary += line.raw.len();
        if line.whole && line.fault().is_none() && got[said..].starts_with(&line.normal()) {
            said += line.normal().len();
        }
    }
    let ends_whole = stream.is_empty() || stream.ends_with(b"\n");
    got.len() == said && (!tail || ends_whole)
}
