//! A plaintext session pays nothing for TLS: before STARTTLS the TLS library has not been started, and the key not been loaded.
//!
//! Both are looked up in the memory of the running program. When aws-lc is started it notes what the processor can, in a variable that
//! is zero before; and of a P-256 key it has loaded it keeps the number, its least significant octet first. After STARTTLS both must be
//! there, so that it is known that they would be found. Here beside the other tests of memory, since only root may look.

use std::process::Command;

use starttls_wrapper::session::Way;

use crate::door::{Start, certificate};
use crate::memory;
use crate::stage::needs_root;
use crate::steps::{At, Standing};

/// Where aws-lc's capabilities of the processor are. The program is linked to fixed addresses (.cargo/config.toml).
fn capabilities() -> u64 {
    let name = if cfg!(target_arch = "aarch64") { "OPENSSL_armcap_P" } else { "OPENSSL_ia32cap_P" };
    let output = Command::new("nm").arg(env!("CARGO_BIN_EXE_starttls-wrapper")).output().expect("nm, of binutils");
    let symbols = String::from_utf8(output.stdout).expect("names");
    let found: Vec<&str> = symbols.lines().filter(|line| line.ends_with(name)).collect();
    let [line] = found[..] else { panic!("one symbol {name}, not {found:?}") };
    u64::from_str_radix(line.split(' ').next().expect("an address"), 16).expect(line)
}

/// Whether the TLS library was started, and whether it has loaded the key.
fn touched(standing: &Standing, capabilities: u64) -> (bool, bool) {
    let pid = standing.door.pid();
    // RFC 5915 in RFC 5208, without parameters: the 32 octets of the number begin at 36.
    let mut number = certificate().key_der()[36..68].to_vec();
    number.reverse();
    let is_started = memory::at(pid, capabilities, 4).iter().any(|&octet| octet != 0);
    (is_started, memory::count(&memory::of(pid), &number) != 0)
}

#[test]
fn before_starttls_the_library_is_not_started_and_the_key_not_loaded() {
    needs_root();
    let capabilities = capabilities();
    for way in Way::ALL {
        // With `raw` the wrapper ends no TLS: there is nothing behind STARTTLS where the library would be started.
        let behind = if way.ends_tls() { &[At::Replay, At::Gate][..] } else { &[] };
        for &at in [At::Ungreeted, At::Snoop, At::HalfLine, At::Owed, At::RelayPlain].iter().chain(behind) {
            let standing = Standing::at(at, &Start { way, ..Start::default() });
            let is_after_starttls = behind.contains(&at);
            assert_eq!(touched(&standing, capabilities), (is_after_starttls, is_after_starttls), "{way:?}, {at:?}");
            standing.close();
        }
    }
}
