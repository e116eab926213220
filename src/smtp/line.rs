//! Client lines: octets as they arrive, in any pieces, become whole command lines.
//!
//! Contract: a line ends at LF, as every server we know ends it, and one CR before the LF is its own. A line with a NUL,
//! with a CR anywhere else, or over [`LIMIT`] octets is a fault: its octets are dropped as they come, and the fault is
//! reported once, when its LF has been seen, so that the reply to it comes in its turn. What a line is never depends on
//! how it was cut into segments.
//!
//! The verb can be asked for as soon as it is whole ([`Peek::Head`]), before its argument has come: cutoff verbs are
//! decided there, so MAIL and AUTH know no limit (RFC 4954 4: AUTH lines may have 12288 octets).

/// The longest line accepted, its line end included. RFC 5321 4.5.3.1.4 asks for 512 and for no limit where possible.
pub const LIMIT: usize = 4096;

/// What is wrong with a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Over [`LIMIT`] octets.
    TooLong,
    /// A NUL, or a CR that is not right before the LF: the two octets on which servers disagree.
    BadOctet,
}

/// What stands at the front of the held octets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peek<'a> {
    /// Nothing, or a line of which not even the verb is whole.
    Incomplete,
    /// The verb of a line and the blank behind it, judged before anything else of the line. Answer with
    /// [`Lines::pass_head`], or take everything with [`Lines::into_held`].
    Head(&'a [u8]),
    /// A whole line without its line end. Take it off with [`Lines::consume`].
    Line(&'a [u8]),
    /// A faulty line has ended; it is gone already. Acknowledge with [`Lines::consume`].
    Faulty(Fault),
}

/// Splits what a client sends into lines. Holds at most what it was given minus what was consumed; the caller bounds it by
/// [`Lines::room`].
#[derive(Debug, Default)]
pub struct Lines {
    held: Vec<u8>,
    /// First octet of the present line.
    start: usize,
    /// Octets before this one hold no LF and no fault.
    scanned: usize,
    head_passed: bool,
    fault: Option<Fault>,
    /// The faulty line's LF has been seen.
    fault_over: bool,
}

impl Lines {
    /// How many octets may be pushed now, so that no more than two full lines are ever held.
    #[must_use]
    pub fn room(&self) -> usize {
        (2 * LIMIT).saturating_sub(self.held.len() - self.start)
    }

    /// Appends octets that arrived.
    pub fn push(&mut self, octets: &[u8]) {
        if self.start > 0 {
            self.held.drain(..self.start);
            self.scanned -= self.start;
            self.start = 0;
        }
        self.held.extend_from_slice(octets);
    }

    /// Gives the memory back, if nothing is held.
    pub fn give_back(&mut self) {
        if self.held.len() == self.start {
            self.held = Vec::new();
            self.scanned -= self.start;
            self.start = 0;
        }
    }

    /// Whether nothing at all is held, not even a part of a line.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.held.len() == self.start && self.fault.is_none()
    }

    /// Whether the present line is faulty, so that a part of it is gone already.
    #[must_use]
    pub fn is_faulty(&self) -> bool {
        self.fault.is_some()
    }

    /// The first octet of the present line, if it has come.
    #[must_use]
    pub fn first(&self) -> Option<u8> {
        if self.fault.is_some() { None } else { self.held.get(self.start).copied() }
    }

    /// Looks at what stands in front. Changes nothing that a caller could see.
    pub fn peek(&mut self) -> Peek<'_> {
        if self.fault.is_none() {
            if !self.head_passed
                && let Some(length) = self.head()
            {
                return Peek::Head(&self.held[self.start..self.start + length]);
            }
            if let Some(end) = self.scan() {
                let line = &self.held[self.start..end];
                return Peek::Line(line.strip_suffix(b"\r").unwrap_or(line));
            }
        }
        match self.drop_faulty() {
            Some(fault) => Peek::Faulty(fault),
            None => Peek::Incomplete,
        }
    }

    /// The head was judged and is nothing special: the next peek shows the whole line.
    pub fn pass_head(&mut self) {
        self.head_passed = true;
    }

    /// Takes off the line, or the fault, that [`Lines::peek`] showed.
    pub fn consume(&mut self) {
        self.head_passed = false;
        if self.fault.is_some() {
            if self.fault_over {
                self.fault = None;
                self.fault_over = false;
            }
            return;
        }
        if let Some(end) = self.scan() {
            self.start = end + 1;
            self.scanned = self.start;
        }
    }

    /// Everything held from the present line on, exactly as it came. Empty inside a faulty line.
    #[must_use]
    pub fn into_held(mut self) -> Vec<u8> {
        self.held.drain(..self.start);
        self.held
    }

    /// Length of verb and leading blanks where a blank behind the verb proves that it is whole and no fault comes first.
    fn head(&self) -> Option<usize> {
        let line = &self.held[self.start..];
        let blank = |o: &u8| *o == b' ' || *o == b'\t';
        let lead = line.iter().take_while(|o| blank(o)).count();
        let word = line[lead..].iter().position(|o| matches!(*o, b' ' | b'\t' | b'\n' | b'\r' | 0))?;
        let end = lead + word;
        (blank(&line[end]) && end < LIMIT).then_some(end)
    }

    /// Position of the LF that ends the present line, or `None`: not there yet, or a fault comes first (then set).
    fn scan(&mut self) -> Option<usize> {
        let limit = self.start + LIMIT;
        let mut at = self.scanned.max(self.start);
        while let Some(&octet) = self.held.get(at) {
            if at >= limit {
                self.fault = Some(Fault::TooLong);
                break;
            }
            match octet {
                b'\n' => {
                    self.scanned = at;
                    return Some(at);
                }
                0 => {
                    self.fault = Some(Fault::BadOctet);
                    break;
                }
                b'\r' => match self.held.get(at + 1) {
                    None if at + 1 < limit => break,
                    Some(b'\n') => {}
                    Some(_) | None => {
                        let fault = if at + 1 < limit { Fault::BadOctet } else { Fault::TooLong };
                        self.fault = Some(fault);
                        break;
                    }
                },
                _ => {}
            }
            at += 1;
        }
        // A full line's worth without LF can only become too long.
        if self.fault.is_none() && at >= limit {
            self.fault = Some(Fault::TooLong);
        }
        self.scanned = at;
        None
    }

    /// Drops what is held of a faulty line; the fault once its LF has come.
    fn drop_faulty(&mut self) -> Option<Fault> {
        let fault = self.fault?;
        if !self.fault_over {
            match self.held[self.start..].iter().position(|o| *o == b'\n') {
                Some(lf) => {
                    self.start += lf + 1;
                    self.fault_over = true;
                }
                None => self.start = self.held.len(),
            }
            self.scanned = self.start;
        }
        self.fault_over.then_some(fault)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Everything `input` splits into, in pieces of `size`; heads are passed, and between pieces memory is given back.
    fn split(input: &[u8], size: usize) -> Vec<Result<Vec<u8>, Fault>> {
        let (mut lines, mut seen) = (Lines::default(), Vec::new());
        for piece in input.chunks(size) {
            lines.push(piece);
            loop {
                match lines.peek() {
                    Peek::Incomplete => break,
                    Peek::Head(_) => {
                        lines.pass_head();
                        continue;
                    }
                    Peek::Line(line) => seen.push(Ok(line.to_vec())),
                    Peek::Faulty(fault) => seen.push(Err(fault)),
                }
                lines.consume();
            }
            lines.give_back();
        }
        seen
    }

    fn everywhere(input: &[u8], expected: &[Result<&[u8], Fault>]) {
        let expected: Vec<_> = expected.iter().map(|r| r.map(<[u8]>::to_vec)).collect();
        for size in [1, 2, 3, 7, 64, 4095, 4096, 4097, input.len()] {
            assert_eq!(split(input, size), expected, "pieces of {size}");
        }
    }

    #[test]
    fn lines_end_at_lf_and_own_one_cr() {
        everywhere(b"EHLO a\r\nNOOP\n\r\n\n", &[Ok(b"EHLO a"), Ok(b"NOOP"), Ok(b""), Ok(b"")]);
    }

    #[test]
    fn memory_is_given_back_where_nothing_is_held_and_no_octet_is_lost() {
        let mut lines = Lines::default();
        lines.push(b"NOOP\r\nRS");
        assert_eq!(lines.peek(), Peek::Line(b"NOOP"));
        lines.consume();
        lines.give_back();
        lines.push(b"ET\r\n");
        assert_eq!(lines.peek(), Peek::Line(b"RSET"));
        lines.consume();
        assert!(lines.held.capacity() > 0);
        lines.give_back();
        assert_eq!(lines.held.capacity(), 0);
        lines.push(b"\n");
        assert_eq!(lines.peek(), Peek::Line(b""));
    }

    #[test]
    fn a_stray_cr_or_a_nul_is_a_fault_to_the_end_of_its_line() {
        everywhere(
            b"EHLO a\r\r\nNOOP\r\nA\rB\r\nNO\0OP\r\nRSET\r\n",
            &[Err(Fault::BadOctet), Ok(b"NOOP"), Err(Fault::BadOctet), Err(Fault::BadOctet), Ok(b"RSET")],
        );
    }

    #[test]
    fn the_limit_counts_the_line_end() {
        let fits = [&vec![b'a'; LIMIT - 2][..], b"\r\n"].concat();
        everywhere(&fits, &[Ok(&fits[..LIMIT - 2])]);
        let bare = [&vec![b'a'; LIMIT - 1][..], b"\n"].concat();
        everywhere(&bare, &[Ok(&bare[..LIMIT - 1])]);
        let long = [&vec![b'a'; LIMIT - 1][..], b"\r\nNOOP\r\n"].concat();
        everywhere(&long, &[Err(Fault::TooLong), Ok(b"NOOP")]);
        let bare = [&vec![b'a'; LIMIT][..], b"\nNOOP\n"].concat();
        everywhere(&bare, &[Err(Fault::TooLong), Ok(b"NOOP")]);
    }

    #[test]
    fn a_flood_without_lf_is_not_stored() {
        let mut lines = Lines::default();
        for _ in 0..1000 {
            lines.push(&[b'a'; 1000]);
            assert_eq!(lines.peek(), Peek::Incomplete);
            assert!(lines.held.len() <= 2 * LIMIT);
        }
        lines.push(b"\n");
        assert_eq!(lines.peek(), Peek::Faulty(Fault::TooLong));
    }

    #[test]
    fn the_verb_is_shown_before_its_argument_has_come() {
        let mut lines = Lines::default();
        lines.push(b"MAI");
        assert_eq!(lines.peek(), Peek::Incomplete);
        lines.push(b"L F");
        assert_eq!(lines.peek(), Peek::Head(b"MAIL"));
        assert_eq!(lines.into_held(), b"MAIL F");
    }

    #[test]
    fn a_verb_as_long_as_a_line_is_none() {
        for (length, is_shown) in [(LIMIT - 1, true), (LIMIT, false)] {
            let mut lines = Lines::default();
            lines.push(&vec![b'a'; length]);
            lines.push(b" ");
            assert_eq!(matches!(lines.peek(), Peek::Head(_)), is_shown, "{length}");
        }
    }

    #[test]
    fn a_line_is_too_long_as_soon_as_its_lf_could_only_be_one_too_many() {
        for (length, is_faulty) in [(LIMIT - 2, false), (LIMIT - 1, true)] {
            let mut lines = Lines::default();
            lines.push(&vec![b'a'; length]);
            lines.push(b"\r");
            assert_eq!(lines.peek(), Peek::Incomplete);
            assert_eq!(lines.is_faulty(), is_faulty, "{length}");
        }
    }

    #[test]
    fn a_nul_in_the_verb_comes_before_the_verb() {
        let mut lines = Lines::default();
        lines.push(b"MAIL\0 FROM:<>\r\n");
        assert_eq!(lines.peek(), Peek::Faulty(Fault::BadOctet));
    }

    #[test]
    fn what_is_held_is_kept_as_it_came() {
        let mut lines = Lines::default();
        lines.push(b"NOOP\nMAIL FROM:<\0>\n\r\r\n");
        assert_eq!(lines.peek(), Peek::Line(b"NOOP"));
        lines.consume();
        assert_eq!(lines.peek(), Peek::Head(b"MAIL"));
        assert_eq!(lines.into_held(), b"MAIL FROM:<\0>\n\r\r\n");
    }
}
