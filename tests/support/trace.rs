//! The program under strace(1): what it asks of the kernel, and a kernel that refuses, interrupts or lies.

use tempfile::TempDir;

use crate::stream::wait_until;
use crate::wire::PATIENCE;

/// One run's tracer: [`Trace::through`] starts it, [`Trace::log`] is what it has written.
pub(crate) struct Trace {
    folder: TempDir,
    words: Vec<String>,
}

impl Trace {
    /// A tracer with these arguments, which name the calls.
    pub(crate) fn of(arguments: &[&str]) -> Self {
        let folder = TempDir::new().unwrap();
        let log = folder.path().join("log");
        // Detached (-D), so that the program itself is the test's child.
        let words = ["/usr/bin/strace", "-D", "-q", "-o", log.to_str().unwrap()];
        Self { words: words.iter().chain(arguments).map(|&word| word.to_owned()).collect(), folder }
    }

    /// For [`crate::door::Start::through`].
    pub(crate) fn through(&self) -> Vec<&str> {
        self.words.iter().map(String::as_str).collect()
    }

    /// What was traced up to now, or a moment ago.
    pub(crate) fn so_far(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    /// All that was traced, once the program has ended. The tracer may be a moment behind.
    pub(crate) fn log(&self) -> String {
        let is_whole = wait_until(PATIENCE, || self.so_far().contains("+++ "));
        assert!(is_whole, "the trace has no end: {:?}", self.so_far().lines().rev().take(30).collect::<Vec<_>>());
        self.so_far()
    }
}
