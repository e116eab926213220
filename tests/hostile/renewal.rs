//! SIGHUP: a listener reads certificate, key and roots again and learns its server anew; what runs, and what is bad, changes nothing.

use std::fs;
use std::path::Path;
use std::process::Command;

use rustix::process::{Signal, kill_process, test_kill_process};
use tempfile::TempDir;

use crate::backend::Certificate;
use crate::door::{Door, Shape, Start, certificate, credulous_tls_client, free_address, tls_client_of};
use crate::page::Page;
use crate::stream::wait_until;
use crate::supervised::children;
use crate::wire::{PATIENCE, Wire};

/// It greets with the file `greeting`, and says yes to everything.
const SERVER: &str = r#"
. "$1/greeting"
while read -r line; do
    case $line in
        QUIT*) printf '221 bye\r\n'; exit ;;
        EHLO*) printf '250-mx\r\n250 SIZE 9\r\n' ;;
        *) printf '250 ok\r\n' ;;
    esac
done
"#;

const RENEWED: &str = "SIGHUP: certificate, keys and roots were read again, for new sessions";
const KEPT: &str = "SIGHUP: what was read before stays in force: ";

const KEEPING: Start<'_> = Start { way: starttls_wrapper::session::Way::Keep, ..Start::USUAL };

struct Stage {
    door: Door,
    folder: TempDir,
    /// How often it has said what came of a SIGHUP.
    said: usize,
}

impl Stage {
    /// A listener whose PROG goes on behind TLS (`keep`), or one with these words for HOST, and its files in a folder.
    fn new(certificate: &Certificate, options: &[&str], start: &Start<'_>) -> Self {
        let folder = TempDir::new().unwrap();
        fs::write(folder.path().join("greeting"), "printf '220 mx\\r\\n'").unwrap();
        put(folder.path(), certificate);
        let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
        let (cert, key, place) = (path("cert.pem"), path("key.pem"), path(""));
        let program = ["/bin/sh", "-c", SERVER, "server", &place];
        let options = [&["--cert", &cert, "--key", &key], options].concat();
        // Where we can, the rights are really gone, and the key is root's.
        let ids = [("PATH", "/usr/bin:/bin"), ("TLS_UID", "64022"), ("TLS_GID", "64022")];
        let environment = if rustix::process::getuid().is_root() { &ids[..] } else { &ids[..1] };
        let door = Door::open(&Start {
            program: Some(&program),
            options: &options,
            environment,
            certificate: false,
            shape: Shape::Listener,
            ..*start
        });
        Self { door, folder, said: 0 }
    }

    fn keeping(certificate: &Certificate) -> Self {
        Self::new(certificate, &[], &KEEPING)
    }

    /// SIGHUP, and what is said of it.
    fn renew(&mut self) -> String {
        self.door.kill(Signal::HUP);
        self.said += 1;
        let said = |this: &Self| this.door.said().lines().filter(|line| line.contains("SIGHUP: ")).count();
        assert!(wait_until(PATIENCE, || said(self) >= self.said), "{}", self.door.said());
        assert_eq!(said(self), self.said, "{}", self.door.said());
        self.door.said().lines().rfind(|line| line.contains("SIGHUP: ")).unwrap().to_owned()
    }

    /// A new client that believes this certificate alone, inside TLS.
    fn secure(&mut self, certificate: &Certificate) -> Wire {
        self.door.connect();
        let mut client = self.door.client.take().unwrap();
        client.get(b"220 mx\r\n").unwrap();
        client.send(b"EHLO c.example\r\n");
        client.get(b"250-mx\r\n250-STARTTLS\r\n250 SIZE 9\r\n").unwrap();
        client.send(b"STARTTLS\r\n");
        client.get(b"220 2.0.0 Ready to start TLS\r\n").unwrap();
        client.secure(tls_client_of(certificate)).unwrap();
        client
    }
}

/// As who renews certificates puts them there: new files in the place of the old ones.
fn put(folder: &Path, certificate: &Certificate) {
    for (name, text, mode) in
        [("cert.pem", &certificate.certificate_pem, 0o644), ("key.pem", &certificate.key_pem, 0o600)]
    {
        let new = folder.join("new");
        fs::write(&new, text).unwrap();
        fs::set_permissions(&new, std::os::unix::fs::PermissionsExt::from_mode(mode)).unwrap();
        fs::rename(&new, folder.join(name)).unwrap();
    }
}

/// What somebody does to the files.
type Spoil<'a> = &'a dyn Fn(&Path);

fn speaks(client: &mut Wire) {
    client.send(b"EHLO c\r\n");
    client.get(b"250-mx\r\n250 SIZE 9\r\n").unwrap();
}

#[test]
fn new_clients_are_shown_the_new_certificate_and_old_sessions_go_on() {
    let (old, new) = (Certificate::new(), Certificate::new());
    let mut stage = Stage::keeping(&old);
    let mut before = stage.secure(&old);
    put(stage.folder.path(), &new);
    let mut between = stage.secure(&old);
    assert!(stage.renew().contains(RENEWED));
    let mut behind = stage.secure(&new);
    for client in [&mut before, &mut between, &mut behind] {
        speaks(client);
    }
}

#[test]
fn a_bad_file_is_one_line_and_leaves_the_old_in_force() {
    let (old, new, metrics) = (Certificate::new(), Certificate::new(), free_address());
    let mut stage = Stage::new(&old, &["--metrics", &metrics.to_string()], &KEEPING);
    let spoil: [(&str, Spoil<'_>, &str); 6] = [
        ("another's key", &|folder| fs::write(folder.join("key.pem"), &old.key_pem).unwrap(), "does not belong"),
        ("no PEM", &|folder| fs::write(folder.join("cert.pem"), "x").unwrap(), "no certificate in it"),
        ("no file", &|folder| fs::remove_file(folder.join("key.pem")).unwrap(), "key.pem: No such file"),
        ("expired", &|folder| put(folder, &Certificate::expired()), "the certificate has expired"),
        ("a huge file", &|folder| fs::write(folder.join("cert.pem"), vec![b'\n'; (1 << 20) + 1]).unwrap(), "too large"),
        (
            "a pipe that nobody writes to",
            &|folder| {
                fs::remove_file(folder.join("key.pem")).unwrap();
                assert!(Command::new("/usr/bin/mkfifo").arg(folder.join("key.pem")).status().unwrap().success());
            },
            "no private key in it",
        ),
    ];
    for (what, spoil, why) in &spoil {
        put(stage.folder.path(), &new);
        spoil(stage.folder.path());
        let said = stage.renew();
        assert!(said.contains(KEPT) && said.contains(*why), "{what}: {said}");
        speaks(&mut stage.secure(&old));
    }
    put(stage.folder.path(), &new);
    assert!(stage.renew().contains(RENEWED));
    speaks(&mut stage.secure(&new));
    let page = Page::of(metrics);
    let outcomes = ["done", "failed"].map(|outcome| page.value(&format!("renewals_total{{outcome=\"{outcome}\"}}")));
    assert_eq!(outcomes, [1.0, spoil.len() as f64]);
}

#[test]
fn a_certificate_that_was_unusable_at_the_start_is_offered_once_it_is_not() {
    let good = Certificate::new();
    let mut stage = Stage::keeping(&Certificate::expired());
    assert!(stage.door.said().contains("STARTTLS is not offered"), "{}", stage.door.said());
    let client = stage.door.client.as_mut().unwrap();
    client.get(b"220 mx\r\n").unwrap();
    client.send(b"EHLO c.example\r\n");
    client.get(b"250-mx\r\n250 SIZE 9\r\n").unwrap();
    put(stage.folder.path(), &good);
    assert!(stage.renew().contains(RENEWED));
    speaks(&mut stage.secure(&good));
}

/// It is made in memory, and nothing makes it anew, though roots are read again beside it.
#[test]
fn a_self_signed_certificate_stays() {
    let roots = TempDir::new().unwrap();
    let file = roots.path().join("roots.pem");
    fs::write(&file, &certificate().certificate_pem).unwrap();
    let options = ["--self-signed", "mx.example", "--backend-ca", file.to_str().unwrap(), "--lazy=no"];
    let program = ["/bin/sh", "-c", "printf '220 mx\\r\\n'; cat >/dev/null"];
    let start = Start { options: &options, program: Some(&program), certificate: false, ..Start::USUAL };
    let mut door = Door::open(&Start { shape: Shape::Listener, ..start });
    door.backend.listen();
    let mut shown = Vec::new();
    for _ in 0..2 {
        door.connect();
        door.client.as_mut().unwrap().get(b"220 mx\r\n").unwrap();
        door.client.as_mut().unwrap().send(b"STARTTLS\r\n");
        door.backend.forget();
        door.backend.wire().unwrap().send(b"220 b\r\n");
        let client = door.client.as_mut().unwrap();
        client.get(b"220 2.0.0 Ready to start TLS\r\n").unwrap();
        client.secure(credulous_tls_client()).unwrap();
        shown.push(client.tls().unwrap().peer_certificates().unwrap()[0].clone());
        if shown.len() == 1 {
            door.kill(Signal::HUP);
            assert!(wait_until(PATIENCE, || door.said().contains(RENEWED)), "{}", door.said());
        }
    }
    assert_eq!(shown[0], shown[1]);
}

/// The file that says who may vouch for HOST is overwritten in place, so that what is bad is bad for whoever reads it late.
#[test]
fn whom_host_may_be_is_read_again_too() {
    let own = Certificate::new();
    let roots = TempDir::new().unwrap();
    let file = roots.path().join("roots.pem");
    fs::write(&file, &Certificate::new().certificate_pem).unwrap();
    let mut stage = Stage::new(&own, &["--backend-ca", file.to_str().unwrap()], &Start::USUAL);
    let ask = |stage: &mut Stage, reply: &[u8]| {
        stage.door.backend.forget();
        stage.door.backend.listen();
        stage.door.connect();
        let client = stage.door.client.as_mut().unwrap();
        client.get(b"220 mx\r\n").unwrap();
        client.send(b"STARTTLS\r\n");
        match (stage.door.backend.wire(), reply.starts_with(b"220")) {
            (Ok(backend), true) => backend.send(b"220 b\r\n"),
            (Err(_), false) => {}
            (outcome, _) => panic!("{:?}: {}", outcome.map(|_| "it is believed"), stage.door.said()),
        }
        stage.door.client.as_mut().unwrap().get(reply).unwrap_or_else(|why| panic!("{why}: {}", stage.door.said()));
    };
    fs::write(&file, &certificate().certificate_pem).unwrap();
    ask(&mut stage, b"454 4.7.0 TLS not available\r\n");
    assert!(stage.renew().contains(RENEWED));
    for bad in ["", "-----BEGIN CERTIFICATE-----\nx\n-----END CERTIFICATE-----\n"] {
        fs::write(&file, bad).unwrap();
        let said = stage.renew();
        assert!(said.contains(KEPT) && said.contains("roots.pem: "), "{said}");
    }
    ask(&mut stage, b"220 2.0.0 Ready to start TLS\r\n");
}

#[test]
fn the_server_is_learned_anew_at_once_even_where_laziness_was_given_up() {
    let mut stage = Stage::new(
        &Certificate::new(),
        &["--lazy"],
        &Start { way: starttls_wrapper::session::Way::Keep, ..Start::USUAL },
    );
    let says = |stage: &Stage, words: &str, times: usize| {
        let says = || stage.door.said().matches(words).count() >= times;
        assert!(wait_until(PATIENCE, says), "{words:?}: {}", stage.door.said());
    };
    let certain = "is started when a client needs it";
    says(&stage, certain, 1);
    let greet = |words: &str| fs::write(stage.folder.path().join("greeting"), words).unwrap();
    greet("printf '220 %s\\r\\n' $(date +%s%N)");
    stage.door.kill(Signal::HUP);
    says(&stage, "learned anew", 1);
    says(&stage, "every client gets one of its own", 1);
    greet("printf '220 mx\\r\\n'");
    stage.door.kill(Signal::HUP);
    says(&stage, "learned anew", 2);
    says(&stage, certain, 2);
    stage.said = 2;
    assert!(stage.renew().contains(RENEWED));
}

#[test]
fn who_opens_the_files_has_nothing_else_open_and_ends_with_us() {
    let mut stage = Stage::keeping(&Certificate::new());
    let opener = |stage: &Stage| match children(stage.door.pid(), "opener")[..] {
        [opener] => opener,
        _ => panic!("one opener"),
    };
    let one = opener(&stage);
    let open = fs::read_dir(format!("/proc/{}/fd", one.as_raw_nonzero())).unwrap();
    let mut open: Vec<_> = open.map(|fd| fs::read_link(fd.unwrap().path()).unwrap()).collect();
    open.retain(|to| to.to_string_lossy().starts_with("socket:"));
    assert!(open.len() <= 3, "stdin, stdout, and the one to ask by: {open:?}");
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        kill_process(one, signal).unwrap();
    }
    assert!(stage.renew().contains(RENEWED));
    stage.door.kill(Signal::KILL);
    assert!(wait_until(PATIENCE, || test_kill_process(one).is_err()), "it is left");

    let old = Certificate::new();
    let mut stage = Stage::keeping(&old);
    kill_process(opener(&stage), Signal::KILL).unwrap();
    let said = stage.renew();
    assert!(said.contains(KEPT), "{said}");
    speaks(&mut stage.secure(&old));
}
