//! Real mail servers in a chroot: a tree of links to target/mta/root, which scripts/setup unpacked, so that their fixed paths and
//! accounts are a test's own and the machine's mail system is not touched.

use std::fs;
use std::net::SocketAddrV4;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::front::Identity;
use crate::stage::{Stage, needs_root};

/// Accounts of the tree's etc/passwd.
pub(crate) const POSTFIX: u32 = 64001;
pub(crate) const POSTDROP: u32 = 64002;
pub(crate) const EXIM: u32 = 64003;
pub(crate) const INBOX: u32 = 64006;

pub(crate) struct Jail<'a> {
    stage: &'a Stage,
    name: String,
}

impl<'a> Jail<'a> {
    #[track_caller]
    pub(crate) fn new(stage: &'a Stage, name: &str) -> Self {
        needs_root();
        let tree = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/mta/root");
        assert!(tree.is_dir(), "{} is missing: run scripts/setup", tree.display());
        let mut copy = stage.command(["cp", "-al"]);
        stage.run(copy.arg(tree).arg(stage.path(name)), b"").succeeded("cp");
        Self { stage, name: name.to_owned() }
    }

    /// A path below the root, seen from outside.
    pub(crate) fn path(&self, inner: &str) -> PathBuf {
        self.stage.path(&self.name).join(inner.trim_start_matches('/'))
    }

    pub(crate) fn write(&self, inner: &str, content: &str) {
        self.stage.write(&format!("{}{inner}", self.name), content);
    }

    /// Makes a folder and gives it to an account.
    pub(crate) fn folder(&self, inner: &str, owner: u32, group: u32) {
        fs::create_dir_all(self.path(inner)).expect(inner);
        std::os::unix::fs::chown(self.path(inner), Some(owner), Some(group)).expect(inner);
    }

    /// Copies a certificate and its key to /cert.pem and /key.pem.
    pub(crate) fn admit(&self, identity: &Identity, owner: u32) {
        fs::copy(&identity.certificate, self.path("cert.pem")).expect("cert.pem");
        fs::copy(&identity.key, self.path("key.pem")).expect("key.pem");
        std::os::unix::fs::chown(self.path("key.pem"), Some(owner), None).expect("key.pem");
    }

    /// A command that runs inside.
    pub(crate) fn command(&self, argv: &[&str]) -> Command {
        let mut command = self.stage.command(["chroot"]);
        command.arg(self.path("")).args(argv);
        command
    }
}

/// Postfix with an `smtps` service (TLS from the first byte) and the few daemons that take a letter to a maildir. Returns its address and
/// that maildir. `protocols` as smtpd_tls_protocols has it.
#[track_caller]
pub(crate) fn postfix(stage: &Stage, identity: &Identity, protocols: &str) -> (SocketAddrV4, PathBuf) {
    postfix_with(stage, identity, protocols, "")
}

/// The same with further lines in its main.cf; what they say twice is as they say it.
#[track_caller]
pub(crate) fn postfix_with(stage: &Stage, identity: &Identity, protocols: &str, more: &str) -> (SocketAddrV4, PathBuf) {
    let (jail, at) = (Jail::new(stage, "postfix"), stage.unused_port());
    jail.admit(identity, 0);
    jail.write(
        "/test/main.cf",
        &format!(
            "compatibility_level = 3.6\nqueue_directory = /queue\ndata_directory = /data\nmyhostname = postfix.example\n\
             mydestination = postfix.example, localhost\nmynetworks =\ninet_interfaces = 127.0.0.1\ninet_protocols = ipv4\nalias_maps =\n\
             local_recipient_maps =\nsmtpd_peername_lookup = no\nsmtpd_relay_restrictions = reject_unauth_destination\n\
             smtpd_tls_cert_file = /cert.pem\nsmtpd_tls_key_file = /key.pem\nsmtpd_tls_security_level = may\nsmtpd_tls_wrappermode = yes\n\
             smtpd_tls_protocols = {protocols}\nsmtpd_tls_mandatory_protocols = {protocols}\nmail_spool_directory = /mail/\n\
             maillog_file = /mail.log\nmaillog_file_prefixes = /\n{more}"
        ),
    );
    jail.write(
        "/test/master.cf",
        &format!(
            "{at} inet n - n - - smtpd\ncleanup unix n - n - 0 cleanup\nqmgr unix n - n 300 1 qmgr\n\
             tlsmgr unix - - n 1000? 1 tlsmgr\nrewrite unix - - n - - trivial-rewrite\nbounce unix - - n - 0 bounce\n\
             defer unix - - n - 0 bounce\ntrace unix - - n - 0 bounce\nproxymap unix - - n - - proxymap\nerror unix - - n - - error\n\
             retry unix - - n - - error\nlocal unix - n n - - local\nanvil unix - - n - 1 anvil\npostlog unix-dgram n - n - 1 postlogd\n"
        ),
    );
    fs::copy(jail.path("usr/share/postfix/dynamicmaps.cf"), jail.path("test/dynamicmaps.cf")).expect("dynamicmaps.cf");
    jail.folder("/mail", INBOX, INBOX);
    jail.folder("/data", POSTFIX, POSTFIX);
    jail.folder("/queue", 0, 0);
    jail.folder("/queue/pid", 0, 0);
    for part in
        ["active", "bounce", "corrupt", "defer", "deferred", "flush", "hold", "incoming", "private", "saved", "trace"]
    {
        jail.folder(&format!("/queue/{part}"), POSTFIX, POSTFIX);
    }
    jail.folder("/queue/maildrop", POSTFIX, POSTDROP);
    jail.folder("/queue/public", POSTFIX, POSTDROP);
    stage.shows(jail.path("mail.log"));
    let mut command = jail.command(&["/usr/lib/postfix/sbin/master", "-d", "-c", "/test"]);
    stage.start("postfix", command.env("MAIL_CONFIG", "/test"), at);
    (at, jail.path("mail/inbox"))
}

/// Exim with TLS on connect, delivering all to one maildir. `priorities` is GnuTLS' string.
#[track_caller]
pub(crate) fn exim(stage: &Stage, identity: &Identity, priorities: &str) -> (SocketAddrV4, PathBuf) {
    exim_with(stage, identity, priorities, "", "accept")
}

/// The same with further lines in its main section, and with this for an ACL at RCPT.
#[track_caller]
pub(crate) fn exim_with(
    stage: &Stage,
    identity: &Identity,
    priorities: &str,
    more: &str,
    rcpt: &str,
) -> (SocketAddrV4, PathBuf) {
    let at = stage.unused_port();
    let more = format!("tls_on_connect_ports = {}\n{more}", at.port());
    exim_at(stage, at, identity, priorities, &more, rcpt)
}

/// Exim in clear, as lenient as these lines of its main section make it.
#[track_caller]
pub(crate) fn exim_in_clear(stage: &Stage, identity: &Identity, more: &str) -> SocketAddrV4 {
    exim_at(stage, stage.unused_port(), identity, "NORMAL", more, "accept").0
}

#[track_caller]
fn exim_at(
    stage: &Stage,
    at: SocketAddrV4,
    identity: &Identity,
    priorities: &str,
    more: &str,
    rcpt: &str,
) -> (SocketAddrV4, PathBuf) {
    let jail = Jail::new(stage, "exim");
    jail.admit(identity, EXIM);
    jail.folder("/test", EXIM, EXIM);
    jail.write(
        "/exim.conf",
        &format!(
            "primary_hostname = exim.example\nspool_directory = /test/spool\nlog_file_path = /test/%slog\npid_file_path = /test/pid\nnotifier_socket =\n\
             local_interfaces = {ip}\ndaemon_smtp_ports = {port}\ntls_advertise_hosts = *\n\
             tls_certificate = /cert.pem\ntls_privatekey = /key.pem\ntls_require_ciphers = {priorities}\nacl_smtp_rcpt = rcpt\n\
             acl_smtp_data = accept\ndeliver_drop_privilege\nhost_lookup =\nrfc1413_hosts =\nkeep_environment =\n{more}\
             begin acl\nrcpt:\n  {rcpt}\nbegin routers\nall:\n  driver = accept\n  transport = keep\nbegin transports\nkeep:\n  driver = appendfile\n  \
             directory = /test/mail\n  maildir_format\n",
            ip = at.ip(),
            port = at.port()
        ),
    );
    stage.shows(jail.path("test/mainlog"));
    stage.start("exim", &mut jail.command(&["/usr/sbin/exim4", "-C", "/exim.conf", "-bdf", "-q1h"]), at);
    (at, jail.path("test/mail"))
}

/// OpenSMTPD in clear, delivering all to one maildir. Debian 12's cannot do TLS at all (6.8.0p2 with OpenSSL 3 loses its privilege-separated
/// key: "missing private key"), so stunnel stands before it.
#[track_caller]
pub(crate) fn opensmtpd(stage: &Stage) -> (SocketAddrV4, PathBuf) {
    let (jail, at) = (Jail::new(stage, "opensmtpd"), stage.unused_port());
    jail.write(
        "/smtpd.conf",
        &format!(
            "listen on {} port {} hostname opensmtpd.example\naction \"keep\" maildir \"/home/inbox/Maildir\"\n\
             match from any for any action \"keep\"\n",
            at.ip(),
            at.port()
        ),
    );
    stage.start("opensmtpd", &mut jail.command(&["/usr/sbin/smtpd", "-d", "-f", "/smtpd.conf"]), at);
    (at, jail.path("home/inbox/Maildir"))
}
