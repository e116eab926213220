//! The private key: the wrapper can't be made to dump it, and after the set-up nothing of its file is left in memory.
//!
//! Played by the rig of the other test programs, but here, because only root may look into a process that is not dumpable.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use crate::backend::{Certificate, Kind};
use crate::door::{Door, Start, certificate};
use crate::memory;
use crate::stage::needs_root;
use crate::steps::{At, Standing};

/// Somebody who is not root.
const SOMEBODY: u32 = 65534;

/// What of a key's file must be nowhere: its lines of base64, and its octets from where no certificate repeats them.
struct Needles {
    pem: Vec<Vec<u8>>,
    der: Vec<Vec<u8>>,
}

impl Needles {
    fn of(certificate: &Certificate, private: impl std::slice::SliceIndex<[u8], Output = [u8]>) -> Self {
        let lines = certificate.key_pem.lines().filter(|line| !line.starts_with('-'));
        // The first line of a PKCS #8 file is mostly the names of algorithms.
        let pem: Vec<_> = lines.skip(1).filter(|line| line.len() >= 32).map(|line| line.as_bytes().to_vec()).collect();
        let der: Vec<_> = certificate.key_der()[private].chunks_exact(32).map(<[u8]>::to_vec).collect();
        assert!(!pem.is_empty() && !der.is_empty());
        Self { pem, der }
    }
}

/// The times that each needle is in the memory of a wrapper that stands at `at`; and the certificate is found there, so that it is
/// known that something would be.
fn found(standing: &Standing, needles: &Needles, certificate: &Certificate) -> (Vec<usize>, Vec<usize>) {
    let memory = memory::of(standing.door.pid());
    assert_ne!(memory::count(&memory, &certificate.leaf()[..64]), 0, "the certificate is not there");
    let count = |needles: &[Vec<u8>]| needles.iter().map(|needle| memory::count(&memory, needle)).collect();
    (count(&needles.pem), count(&needles.der))
}

fn nothing_is_left(at: At, start: &Start<'_>, needles: &Needles, certificate: &Certificate) {
    let standing = Standing::at(at, start);
    let (pem, der) = found(&standing, needles, certificate);
    assert!(pem.iter().all(|&count| count == 0), "{at:?}: PEM lines found: {pem:?}");
    // Before STARTTLS the octets wait, once, for their use; after the set-up aws-lc has the key's numbers in its own form (limbs, the
    // least significant first), and the file's octets are nowhere.
    let expected = usize::from(at == At::Snoop);
    assert!(der.iter().all(|&count| count == expected), "{at:?}: DER found, {expected} expected: {der:?}");
    standing.close();
}

#[test]
fn of_a_p256_key_nothing_is_left_after_the_set_up() {
    needs_root();
    let certificate = certificate();
    // RFC 5915 in RFC 5208, without parameters: the 32 octets of the number begin at 36.
    let needles = Needles::of(&certificate, 36..68);
    for at in [At::Snoop, At::ClientHandshake, At::Gate, At::RelayTls] {
        nothing_is_left(at, &Start::default(), &needles, &certificate);
    }
}

#[test]
fn of_an_rsa_key_in_the_certificates_file_nothing_is_left_after_the_set_up() {
    needs_root();
    let certificate = Certificate::of(Kind::Rsa);
    // The primes and what follows them (RFC 8017 A.1.2): the second half.
    let needles = Needles::of(&certificate, certificate.key_der().len() / 2..);
    let folder = tempfile::TempDir::new().expect("a folder");
    let file = folder.path().join("both.pem");
    fs::write(&file, [certificate.certificate_pem.as_str(), &certificate.key_pem].concat()).expect("both.pem");
    let options = ["--backend-insecure", "--cert", file.to_str().expect("a name")];
    let start = Start { certificate: false, options: &options, ..Start::default() };
    for at in [At::Snoop, At::ClientHandshake] {
        nothing_is_left(at, &start, &needles, &certificate);
    }
}

#[test]
fn the_wrapper_is_not_dumpable_and_prog_is() {
    needs_root();
    let program = ["/bin/sh", "-c", "echo 220 hello; read line; echo 250 me; exec cat"];
    let mut door = Door::open(&Start { program: Some(&program), uid: Some(SOMEBODY), ..Start::default() });
    let client = door.client.as_mut().expect("a client");
    client.get(b"220 hello\n").expect("the greeting");
    client.send(b"EHLO c\r\n");
    // Without the key there is nothing to protect.
    client.get(b"250-me\n250 STARTTLS\r\n").unwrap_or_else(|why| panic!("{why}: {}", door.said()));
    let pid = door.pid().as_raw_nonzero().get();
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).expect("children");
    // proc(5): the files of a process that is not dumpable belong to root, whoever it runs as.
    let owner = |pid: &str| fs::metadata(format!("/proc/{pid}/mem")).unwrap_or_else(|why| panic!("{pid}: {why}")).uid();
    assert_eq!((owner(&pid.to_string()), owner(children.trim())), (0, SOMEBODY));
}

#[test]
fn of_the_ticket_keys_prog_has_nothing_and_the_text_is_wiped() {
    needs_root();
    let folder = tempfile::TempDir::new().expect("a folder");
    let file = folder.path().join("keys");
    let texts = ["a".repeat(64), "c".repeat(64)];
    fs::write(&file, texts.join("\n")).expect("keys");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).expect("keys");
    let options = ["--ticket-keys", file.to_str().expect("a name")];
    let standing = Standing::at(At::Snoop, &Start { options: &options, ..Start::default() });
    let prog = rustix::process::Pid::from_raw(standing.child.report.pid as i32).expect("a pid");
    assert_eq!(standing.child.report.fds, "0 1 2");
    let octets = [[0x69, 0xa6, 0x9a].repeat(16), [0x71, 0xc7, 0x1c].repeat(16)];
    let (ours, progs) = (memory::of(standing.door.pid()), memory::of(prog));
    for (text, octets) in texts.iter().zip(&octets) {
        assert_eq!(memory::count(&ours, text.as_bytes()), 0, "the text is there");
        assert_eq!(memory::count(&ours, octets), 1, "they wait for their use");
        assert_eq!(memory::count(&progs, text.as_bytes()) + memory::count(&progs, octets), 0, "PROG has them");
    }
    standing.close();
    let standing = Standing::at(At::ClientHandshake, &Start { options: &options, ..Start::default() });
    let ours = memory::of(standing.door.pid());
    // In use they are in aws-lc's hands, the name beside each; their octets in one piece are nowhere.
    assert!(octets.iter().all(|octets| memory::count(&ours, octets) == 0), "the octets of the file are there");
    standing.close();
}
