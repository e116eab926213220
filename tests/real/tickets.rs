//! A real client resumes TLS sessions by tickets, as the README has the keys rotated.

use std::path::Path;

use crate::backends::stunnel;
use crate::front::{Identity, MAILFRONT, tcpserver, wrapper};
use crate::letter::Queue;
use crate::stage::Stage;

/// The README's lines for cron, in this folder.
fn rotation(folder: &Path) -> String {
    let readme = include_str!("../../README.md");
    let from = readme.split("  umask 077; cd /etc/ssl\n").nth(1).and_then(|rest| rest.split("```").next());
    format!("umask 077; cd {} && {}", folder.display(), from.expect("the lines for cron").trim())
}

#[test]
fn openssl_resumes_in_another_child_and_after_a_rotation_but_not_by_a_key_that_is_gone() {
    let stage = Stage::new();
    let identity = Identity::self_signed(&stage, "own");
    let keys = stage.path("ticket.keys");
    let folder = keys.parent().expect("a folder").to_owned();
    let shell = |script: &str| stage.run(&mut stage.command(["/bin/sh", "-ec", script]), b"").succeeded(script);
    shell(&format!("umask 077; openssl rand -base64 48 >{}", keys.display()));
    let (child, backend) = (Queue::new(&stage, "child"), Queue::new(&stage, "backend"));
    let host = stunnel(&stage, &identity, "TLSv1.3", &backend);
    let options = ["--ticket-keys", keys.to_str().expect("a name")];
    let at = tcpserver(&stage, "front", &wrapper(&identity, &options, host, &MAILFRONT), &child);
    let session = |version: &str, flag: &str, file: &str| {
        let mut command = stage.command(["openssl", "s_client", "-starttls", "smtp", "-ign_eof", version]);
        command.args(["-verify_return_error", "-verify_hostname", "localhost", "-CAfile"]).arg(&identity.certificate);
        command.arg("-connect").arg(at.to_string()).arg(flag).arg(stage.path(file));
        let output = stage.run(&mut command, b"EHLO c.example\r\nQUIT\r\n").succeeded("openssl s_client");
        assert!(output.contains("\n221 "), "{output}");
        let (is_new, is_reused) = (output.contains("\nNew, TLS"), output.contains("\nReused, TLS"));
        assert!(is_new != is_reused, "{output}");
        is_reused
    };
    for version in ["-tls1_2", "-tls1_3"] {
        assert!(!session(version, "-sess_out", version));
        assert!(session(version, "-sess_in", version));
    }
    shell(&rotation(&folder));
    for version in ["-tls1_2", "-tls1_3"] {
        assert!(session(version, "-sess_in", version), "{version}: the key of yesterday is there still");
    }
    // Three are kept.
    shell(&rotation(&folder));
    shell(&rotation(&folder));
    for version in ["-tls1_2", "-tls1_3"] {
        assert!(!session(version, "-sess_in", version), "{version}: its key is gone");
    }
    // The summary of each: two full ones of either version, and two that were resumed.
    stage.wait_until_childless("front");
    let log = stage.log("front");
    let count = |words: &str| log.lines().filter(|line| line.contains(words)).count();
    assert_eq!((count(" resumed=no "), count(" resumed=yes ")), (4, 4), "{log}");
}
