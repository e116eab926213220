//! What the build must have made of the program (README, Building).
#![allow(clippy::expect_used)] // a test fails by panicking

/// Whether the program as it was built for these tests holds `text`.
fn holds(text: &str) -> bool {
    let program = std::fs::read(env!("CARGO_BIN_EXE_starttls-wrapper")).expect("the program");
    program.windows(text.len()).any(|window| window == text.as_bytes())
}

/// With jitter entropy each TLS session starts with 40 ms of processor time. AWS_LC_SYS_NO_JITTER_ENTROPY, which
/// `.cargo/config.toml` sets, keeps its collector out.
#[test]
fn the_tls_library_has_no_jitter_entropy() {
    assert!(holds("_RAND_bytes"), "no symbols to look at: is this a stripped build?");
    assert!(!holds("jent_read_entropy"), "AWS_LC_SYS_NO_JITTER_ENTROPY was not set when aws-lc-sys was built");
}
