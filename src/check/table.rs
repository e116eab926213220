//! The table: a line for each thing that was tried, as soon as it is known, and below it what to do where that is not `ok`.
//!
//! Contract: a cell is one line of printable ASCII whatever was found, at most [`MOST`] octets.

use std::io::{self, Write};

/// What became of one thing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// As it should be.
    Ok,
    /// It works, but not as most would want it.
    Warning,
    /// Clients will suffer, or others by us.
    Problem,
    /// Nobody knows.
    Untried,
}

/// The most that is shown of a finding.
const MOST: usize = 400;

/// How wide the names are.
const NAMES: usize = 20;

/// The table, so far.
pub(super) struct Table {
    out: Box<dyn Write>,
    is_coloured: bool,
    problems: usize,
    failed: Option<io::Error>,
}

impl Table {
    pub(super) fn new(out: Box<dyn Write>, is_coloured: bool) -> Self {
        Self { out, is_coloured, problems: 0, failed: None }
    }

    pub(super) fn ok(&mut self, what: &str, found: &str) {
        self.row(Verdict::Ok, what, found, "");
    }

    pub(super) fn warning(&mut self, what: &str, found: &str, advice: &str) {
        self.row(Verdict::Warning, what, found, advice);
    }

    pub(super) fn problem(&mut self, what: &str, found: &str, advice: &str) {
        self.row(Verdict::Problem, what, found, advice);
    }

    pub(super) fn untried(&mut self, what: &str, found: &str, advice: &str) {
        self.row(Verdict::Untried, what, found, advice);
    }

    /// How many problems there were.
    ///
    /// # Errors
    /// Not all of the table was written.
    pub(super) fn end(mut self) -> io::Result<usize> {
        match self.failed.take() {
            Some(error) => Err(error),
            None => self.out.flush().map(|()| self.problems),
        }
    }

    fn row(&mut self, verdict: Verdict, what: &str, found: &str, advice: &str) {
        self.problems += usize::from(verdict == Verdict::Problem);
        let (word, colour) = match verdict {
            Verdict::Ok => ("ok", 32),
            Verdict::Warning => ("warning", 33),
            Verdict::Problem => ("problem", 31),
            Verdict::Untried => ("untried", 36),
        };
        let found = cell(found);
        let mut text = if self.is_coloured {
            format!("\x1b[{colour}m{word:<7}\x1b[0m  {what:<NAMES$}  {found}\n")
        } else {
            format!("{word:<7}  {what:<NAMES$}  {found}\n")
        };
        if !advice.is_empty() {
            text.push_str(&format!("{:indent$}{}\n", "", cell(advice), indent = 7 + 2 + NAMES + 2));
        }
        let written = self.out.write_all(text.as_bytes()).and_then(|()| self.out.flush());
        self.failed = self.failed.take().or(written.err());
    }
}

/// Printable, and not too long. What servers say is escaped where it is quoted; this is the second fence.
fn cell(found: &str) -> String {
    let mut cell = String::with_capacity(found.len());
    for octet in found.bytes() {
        match octet {
            b' '..=b'~' => cell.push(char::from(octet)),
            _ => cell.push_str(&format!("\\x{octet:02x}")),
        }
        if cell.len() > MOST {
            cell.truncate(MOST);
            cell.push_str("...");
            break;
        }
    }
    cell
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;
    use std::rc::Rc;

    #[derive(Clone, Default)]
    struct Paper(Rc<RefCell<Vec<u8>>>);

    impl Write for Paper {
        fn write(&mut self, octets: &[u8]) -> io::Result<usize> {
            self.0.borrow_mut().write(octets)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn written(is_coloured: bool, fill: impl FnOnce(&mut Table)) -> (String, usize) {
        let paper = Paper::default();
        let mut table = Table::new(Box::new(paper.clone()), is_coloured);
        fill(&mut table);
        let problems = table.end().unwrap();
        (String::from_utf8(paper.0.take()).unwrap(), problems)
    }

    #[test]
    fn only_problems_count_and_advice_stands_below() {
        let (text, problems) = written(false, |table| {
            table.ok("key", "it fits");
            table.warning("days left", "3", "Renew it.");
            table.problem("chain", "broken", "Mend it.");
            table.untried("HOST", "not reached", "See above.");
        });
        assert_eq!(
            text,
            "ok       key                   it fits\n\
             warning  days left             3\n                               Renew it.\n\
             problem  chain                 broken\n                               Mend it.\n\
             untried  HOST                  not reached\n                               See above.\n"
        );
        assert_eq!(problems, 1);
    }

    #[test]
    fn a_cell_is_one_printable_line_whatever_was_found() {
        let (text, _) = written(false, |table| table.ok("x", "a\r\n\u{1b}[2J\u{e9}\u{202e}b"));
        assert_eq!(text, "ok       x                     a\\x0d\\x0a\\x1b[2J\\xc3\\xa9\\xe2\\x80\\xaeb\n");
        let (text, _) = written(false, |table| table.ok("x", &"y".repeat(9999)));
        assert!(text.len() < 500 && text.ends_with("y...\n"), "{text}");
    }

    #[test]
    fn only_the_verdict_is_coloured() {
        let (text, _) = written(true, |table| table.problem("x", "y", "z"));
        assert_eq!(text, "\x1b[31mproblem\x1b[0m  x                     y\n                               z\n");
    }

    #[test]
    fn a_table_that_can_not_be_written_is_an_error() {
        struct Full;
        impl Write for Full {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::StorageFull.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let mut table = Table::new(Box::new(Full), false);
        table.ok("x", "y");
        assert!(table.end().is_err());
    }
}
