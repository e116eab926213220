//! aws-lc is built without the constructor that looks what the processor can (.cargo/config.toml): is that made up for before
//! anything is encrypted? One test only: it is done once in a process.
#![cfg(target_arch = "x86_64")]
#![allow(clippy::unwrap_used, missing_docs)]

use std::time::{Duration, Instant};

use aws_lc_rs::aead::{AES_128_GCM, Aad, Algorithm, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use starttls_wrapper::tls::Identity;

/// The least of several times for a MiB in records of 16 KiB.
fn a_mebibyte(algorithm: &'static Algorithm) -> Duration {
    let key = LessSafeKey::new(UnboundKey::new(algorithm, &vec![7; algorithm.key_len()]).unwrap());
    let mut record = vec![0; 16 * 1024];
    let mut seal = || {
        let began = Instant::now();
        for count in 0..64_u8 {
            let nonce = Nonce::assume_unique_for_key([count; 12]);
            let _tag = key.seal_in_place_separate_tag(nonce, Aad::empty(), &mut record).unwrap();
        }
        began.elapsed()
    };
    (0..20).map(|_| seal()).min().unwrap()
}

#[test]
fn aes_is_computed_by_the_processors_own_instructions() {
    assert!(std::arch::is_x86_feature_detected!("aes"), "this processor has no AES: nothing can be said here");
    // The first computation of all; rustls' own configurations start aws-lc too, as it happens.
    Identity::self_signed("localhost").unwrap();
    let (aes, chacha) = (a_mebibyte(&AES_128_GCM), a_mebibyte(&CHACHA20_POLY1305));
    // With the instructions AES takes 0.5 to 1.1 times ChaCha20's time (which has vector instructions itself, and gains more where
    // they are wide), without them 3.4 times: both ways measured with all the instructions off, as they are all found by one call.
    assert!(aes < 2 * chacha, "AES-128-GCM {aes:?}, ChaCha20-Poly1305 {chacha:?} a MiB");
}
