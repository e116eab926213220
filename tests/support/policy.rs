//! The policy that a dialogue is played with: its options, read as the program reads its command line.

use starttls_wrapper::cli::{Invocation, read};
use starttls_wrapper::session::Policy;

use super::dialogue::Dialogue;

/// The error names the file, and what is wrong with its options.
pub(crate) fn policy(dialogue: &Dialogue) -> Result<Policy, String> {
    let mut words = dialogue.options.clone();
    if dialogue.certificate && dialogue.way.ends_tls() {
        words.extend(["--cert".to_owned(), "none.pem".to_owned()]);
    }
    words.extend(["--way", dialogue.way.name()].map(str::to_owned));
    words.extend(["localhost", "465"].iter().filter(|_| dialogue.way.dials()).map(|word| (*word).to_owned()));
    words.push("smtpd".to_owned());
    match read(words.into_iter().map(Into::into), |_| None) {
        Ok(Invocation::Serve(config)) => Ok(config.policy),
        Ok(Invocation::Print(_)) => Err(format!("{}: the options print something", dialogue.path.display())),
        Err(fatal) => Err(format!("{}: {fatal}", dialogue.path.display())),
    }
}
