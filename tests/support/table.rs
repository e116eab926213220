//! The table that `--check` prints, as a test reads it.

use std::process::{Command, Stdio};

use crate::stream::wait_until;
use crate::wire::PATIENCE;

/// One thing that was tried.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Row {
    pub(crate) verdict: String,
    pub(crate) what: String,
    pub(crate) found: String,
    /// Empty where the verdict needs none.
    pub(crate) advice: String,
}

/// The whole table, and the exit code.
#[derive(Debug)]
pub(crate) struct Table {
    pub(crate) text: String,
    pub(crate) rows: Vec<Row>,
    pub(crate) code: Option<i32>,
}

impl Table {
    /// Runs the command, which ends within a few time-outs.
    #[track_caller]
    pub(crate) fn of(command: &mut Command) -> Self {
        let mut out = tempfile::tempfile().unwrap();
        command.stdin(Stdio::null()).stdout(out.try_clone().unwrap());
        let mut child = command.spawn().unwrap();
        let mut ended = None;
        wait_until(3 * PATIENCE, || {
            ended = child.try_wait().unwrap();
            ended.is_some()
        });
        if ended.is_none() {
            let _ = child.kill();
            let _ = child.wait();
            panic!("{command:?} does not end");
        }
        let mut text = String::new();
        std::io::Seek::rewind(&mut out).unwrap();
        std::io::Read::read_to_string(&mut out, &mut text).unwrap();
        let table = Self { rows: rows(&text), text, code: ended.and_then(|status| status.code()) };
        let has_problem = table.rows.iter().any(|row| row.verdict == "problem");
        assert_eq!(table.code, Some(i32::from(has_problem)), "{}", table.text);
        assert!(table.text.bytes().all(|octet| matches!(octet, b'\n' | b' '..=b'~')), "{:?}", table.text);
        table
    }

    /// The one row of that name.
    #[track_caller]
    pub(crate) fn row(&self, what: &str) -> &Row {
        let mut found = self.rows.iter().filter(|row| row.what == what);
        match (found.next(), found.next()) {
            (Some(row), None) => row,
            (first, _) => panic!("{what}: {} rows in\n{}", if first.is_some() { "several" } else { "no" }, self.text),
        }
    }

    /// A row's verdict, and that it begins with `found`.
    #[track_caller]
    pub(crate) fn has(&self, verdict: &str, what: &str, found: &str) {
        let row = self.row(what);
        assert!(
            row.verdict == verdict && row.found.starts_with(found),
            "{verdict} {found:?}, not {row:?}\n{}",
            self.text
        );
    }
}

/// Each row has its columns; advice stands below whatever is not ok.
#[track_caller]
fn rows(text: &str) -> Vec<Row> {
    let mut rows: Vec<Row> = Vec::new();
    for line in text.lines() {
        let cut = |from: usize, to: usize| line.get(from..to.min(line.len())).unwrap_or_default().trim_end().to_owned();
        let (verdict, what, rest) = (cut(0, 7), cut(9, 29), cut(31, usize::MAX));
        if verdict.is_empty() {
            let last = rows.last_mut().expect("a row above the advice");
            assert!(what.is_empty() && last.advice.is_empty() && last.verdict != "ok", "{line:?}");
            last.advice = rest;
        } else {
            assert!(["ok", "warning", "problem", "untried"].contains(&verdict.as_str()), "{line:?}");
            rows.push(Row { verdict, what, found: rest, advice: String::new() });
        }
    }
    assert!(rows.iter().all(|row| row.advice.is_empty() == (row.verdict == "ok")), "{text}");
    rows
}
