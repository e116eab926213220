//! Random client streams, drawn from a grammar of what servers have disagreed about: line ends, NUL, blanks, case, quotes, octets over
//! 127, lengths next to every limit, many commands in one segment. The same seed gives the same stream for ever.

/// xorshift64*.
pub(crate) struct Random(u64);

const VERBS: [&str; 27] = [
    "EHLO", "HELO", "STARTTLS", "NOOP", "RSET", "VRFY", "EXPN", "HELP", "QUIT", "MAIL", "RCPT", "DATA", "BDAT", "AUTH",
    "ETRN", "TURN", "ATRN", "SEND", "SOML", "SAML", "BURL", "XCLIENT", "XFORWARD", "LHLO", "XFOO", "GET", "",
];
const ARGUMENTS: [&str; 14] = [
    "",
    "",
    "",
    "client.example",
    "FROM:<a@b.example>",
    "from:<>",
    "TO:<c@d.example>",
    "PLAIN AHgAeQ==",
    "3 LAST",
    "x y",
    "\u{e9}\u{e9}",
    "<\"a b\"@c>",
    "ADDR=192.0.2.1",
    "MAIL FROM:<a>",
];
const ENDS: [&str; 12] =
    ["\r\n", "\r\n", "\r\n", "\r\n", "\n", "\n", "\r\r\n", "\r", "\n\r", "\0\r\n", " \r\n", "\t\x0b\r\n"];
const BLANKS: [&str; 11] = [" ", " ", " ", " ", "", "\t", "  ", ":", "\0", "\x0b", "\r"];
const LENGTHS: [usize; 7] = [510, 1000, 2046, 4094, 4096, 8192, 16_384];
const SPECIAL: &[u8] = b"\"\\ \t\0\r\x0b\x0c\x80\xff:<-.";

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    pub(crate) fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) as usize % bound
    }

    pub(crate) fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    fn pick<'a>(&mut self, from: &[&'a str]) -> &'a [u8] {
        from[self.below(from.len())].as_bytes()
    }

    /// A verb as nobody should write it.
    fn verb(&mut self, stream: &mut Vec<u8>) {
        let start = stream.len();
        stream.extend_from_slice(self.pick(&VERBS));
        if self.one_in(3) {
            let from = start.min(stream.len());
            stream[from..].iter_mut().filter(|_| self.one_in(2)).for_each(|octet| *octet = octet.to_ascii_lowercase());
        }
        for _ in 0..[0, 0, 0, 1, 1, 2, 3][self.below(7)] {
            let at = start + self.below(stream.len() - start + 1);
            let special = SPECIAL[self.below(SPECIAL.len())];
            match self.below(6) {
                0 if at < stream.len() => drop(stream.remove(at)),
                1 if at < stream.len() => stream[at] ^= 1 << self.below(8),
                2 => drop(stream.splice(start..start, [b'"'])),
                _ => stream.insert(at, special),
            }
        }
    }

    fn line(&mut self, stream: &mut Vec<u8>) {
        let start = stream.len();
        if self.one_in(12) {
            stream.extend_from_slice(self.pick(&[" ", "\t", "  ", "\x0b", "\"\"", "\\"]));
        }
        self.verb(stream);
        let argument = self.pick(&ARGUMENTS);
        if !argument.is_empty() || self.one_in(4) {
            stream.extend_from_slice(self.pick(&BLANKS));
            stream.extend_from_slice(argument);
        }
        if self.one_in(60) {
            // So much more; or so much in all, where a server may cut the line.
            let from = if self.one_in(2) { stream.len() } else { start };
            let length = LENGTHS[self.below(LENGTHS.len())] + self.below(5);
            stream.resize(stream.len().max(from + length), b'a');
            stream.extend_from_slice(self.pick(&["", " MAIL FROM:<>", "MAIL FROM:<>"]));
        }
        stream.extend_from_slice(self.pick(&ENDS));
    }

    /// A client's stream: one to eight lines, the last one sometimes not whole.
    pub(crate) fn stream(&mut self) -> Vec<u8> {
        let mut stream = Vec::new();
        if self.one_in(2) {
            stream.extend_from_slice(b"EHLO client.example\r\n");
        }
        for _ in 0..=self.below(8) {
            self.line(&mut stream);
        }
        if self.one_in(8) {
            stream.truncate(self.below(stream.len() + 1));
        }
        stream
    }

    /// A session that keeps the rules and does without STARTTLS: harmless commands, then perhaps mail, then perhaps the end.
    pub(crate) fn plain_session(&mut self) -> Vec<u8> {
        let mut stream = Vec::new();
        for _ in 0..self.below(6) {
            let verb = [
                "EHLO a",
                "ehlo [192.0.2.1]",
                "HELO a",
                "NOOP",
                "RSET",
                "VRFY b",
                "EXPN c",
                "HELP",
                "XFOO d",
                "",
                "LHLO e",
            ];
            stream.extend_from_slice(self.pick(&verb));
            stream.extend_from_slice(b"\r\n");
        }
        for _ in 0..self.below(3) {
            stream.extend_from_slice(b"MAIL FROM:<a@b.example>\r\nRCPT TO:<c@d.example>\r\nDATA\r\n");
            for _ in 0..self.below(5) {
                let text = ["Subject: x", "", "..", "STARTTLS", "a\rb", "\u{e9}", "QUIT", ". ", "EHLO x", "a\0b"];
                stream.extend_from_slice(self.pick(&text));
                stream.extend_from_slice(b"\r\n");
            }
            stream.extend_from_slice(b".\r\n");
        }
        if self.one_in(2) {
            stream.extend_from_slice(b"QUIT\r\n");
        }
        stream
    }
}
