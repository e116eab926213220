//! The policy that a dialogue is played with: its way and options, read as the program reads its command line.

use starttls_wrapper::cli::{Invocation, read};
use starttls_wrapper::session::{Policy, Way};

use super::dialogue::Dialogue;

/// The options that choose a way.
pub(crate) fn way_options(way: Way) -> Vec<&'static str> {
    match way {
        Way::Mute => vec!["--mute=always"],
        Way::TlsLate => vec!["--way", "tls", "--send-proxy", "v2", "--proxy-facts", "late"],
        Way::PlainLate => vec!["--way", "plain", "--send-proxy", "v2", "--proxy-facts", "late"],
        _ => vec!["--way", way.name()],
    }
}

/// The error names the file, and what is wrong with its options.
pub(crate) fn policy(dialogue: &Dialogue) -> Result<Policy, String> {
    policy_of(dialogue, &dialogue.told)
}

/// The same, with `STARTTLS_REPLAY` set to this and nothing else.
pub(crate) fn policy_of(dialogue: &Dialogue, replay: &str) -> Result<Policy, String> {
    let mut words = dialogue.options.clone();
    if dialogue.certificate && dialogue.way.ends_tls() {
        words.extend(["--cert".to_owned(), "none.pem".to_owned()]);
    }
    words.extend(way_options(dialogue.way).iter().map(|word| (*word).to_owned()));
    words.extend(["localhost", "465"].iter().filter(|_| dialogue.way.dials()).map(|word| (*word).to_owned()));
    words.push("smtpd".to_owned());
    let environment = |name: &str| (name == "STARTTLS_REPLAY").then(|| replay.into());
    match read(words.into_iter().map(Into::into), environment) {
        Ok(Invocation::Serve(config)) => Ok(config.policy),
        Ok(other) => Err(format!("{}: the options ask for no session: {other:?}", dialogue.path.display())),
        Err(fatal) => Err(format!("{}: {fatal}", dialogue.path.display())),
    }
}
