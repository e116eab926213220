//! A session without STARTTLS is the bare server's, octet for octet, but for the keyword: mailfront directly and behind the program,
//! with the same random streams (tests/differential/streams.rs).

use crate::stage::Stage;
use crate::streams::Random;

/// Sessions compared; each is two processes' life.
const SESSIONS: usize = 40;

#[test]
fn mailfront_says_and_hears_the_same_behind_us() {
    let stage = Stage::new();
    let (directly, behind) = (stage.path("directly"), stage.path("behind"));
    let mut keywords = 0;
    // mailfront's echo backend (2.12) crashes on a NUL in a letter, and differently each time.
    let streams =
        (1..).map(|seed| (seed, Random::new(seed).plain_session())).filter(|(_, stream)| !stream.contains(&0));
    for (seed, stream) in streams.take(SESSIONS) {
        let stream = [&stream[..], b"QUIT\r\n"].concat();
        // What the child hears is what tee writes.
        let prog = |heard: &std::path::Path| {
            let script = format!("tee '{}' | mailfront smtp echo accept 2>/dev/null", heard.display());
            ["sh".to_owned(), "-c".to_owned(), script]
        };
        let bare = stage.run(&mut stage.command(prog(&directly)), &stream);
        let wrapper = env!("CARGO_BIN_EXE_starttls-wrapper").to_owned();
        let options = ["-qqq", "--self-signed", "localhost", "127.0.0.1", "1"].map(str::to_owned);
        let argv = [vec![wrapper], options.to_vec(), prog(&behind).to_vec()].concat();
        let wrapped = stage.run(&mut stage.command(argv), &stream);
        let shown = stream.escape_ascii();
        assert_eq!(std::fs::read(&directly).unwrap(), std::fs::read(&behind).unwrap(), "seed {seed}: {shown}");
        keywords += wrapped.output.matches("250-STARTTLS\r\n").count();
        assert_eq!(bare.output, wrapped.output.replace("250-STARTTLS\r\n", ""), "seed {seed}: {shown}");
    }
    assert!(keywords > 0, "no EHLO among {SESSIONS} sessions");
}
