//! A test's stage: its address, its scratch folder, its daemons.
//!
//! Nothing outlives a stage. Dropping it kills the process groups it started and whatever else carries its marker in the environment
//! or lives in a chroot below its folder, and reaps them; if the test failed, it prints every log first.

use std::cell::{Cell, RefCell};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process, kill_process_group};

use crate::stream::wait_until;

/// How long anything may take before the test fails: far above what the slowest step needs on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Asks `condition` until it yields, and fails after [`PATIENCE`] with what was waited for.
pub(crate) fn wait_for<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let mut found = None;
    wait_until(PATIENCE, || {
        found = condition();
        found.is_some()
    });
    found.unwrap_or_else(|| panic!("waited {PATIENCE:?} in vain for {what}"))
}

/// Fails where root is needed and absent; scripts/test goes through sudo.
pub(crate) fn needs_root() {
    assert!(
        rustix::process::geteuid().is_root(),
        "this test starts real servers in a chroot: run it as root (scripts/test does)"
    );
}

pub(crate) struct Stage {
    address: Ipv4Addr,
    next_port: Cell<u16>,
    folder: tempfile::TempDir,
    marker: String,
    daemons: RefCell<Vec<(String, Child)>>,
    logs: RefCell<Vec<PathBuf>>,
}

/// A client program that has ended: its exit status, and all that it wrote to stdout and stderr.
pub(crate) struct Finished {
    pub(crate) status: ExitStatus,
    pub(crate) output: String,
}

impl Finished {
    /// The output of a program that must have succeeded.
    #[track_caller]
    pub(crate) fn succeeded(self, what: &str) -> String {
        assert!(self.status.success(), "{what} failed ({}):\n{}", self.status, self.output);
        self.output
    }
}

impl Stage {
    /// An empty stage. Its address, somewhere in 127/8, is no other test's and hardly another run's.
    pub(crate) fn new() -> Self {
        static STAGES: AtomicU16 = AtomicU16::new(1);
        let number = STAGES.fetch_add(1, Ordering::Relaxed);
        let [high, low] = (std::process::id() as u16).to_be_bytes();
        let parent = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/mta/stages");
        fs::create_dir_all(&parent).expect("target/mta/stages");
        let folder = tempfile::Builder::new().prefix("stage-").tempdir_in(parent).expect("a scratch folder");
        let open = <fs::Permissions as std::os::unix::fs::PermissionsExt>::from_mode(0o755);
        fs::set_permissions(folder.path(), open).expect("a folder that servers without privileges may enter");
        Self {
            address: Ipv4Addr::new(127, 1 + high % 250, low, 1 + number as u8),
            next_port: Cell::new(2525),
            marker: format!("STAGE_MARKER={}-{number}", std::process::id()),
            folder,
            daemons: RefCell::default(),
            logs: RefCell::default(),
        }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// An address and port that nothing else listens on.
    pub(crate) fn unused_port(&self) -> SocketAddrV4 {
        let port = self.next_port.get();
        self.next_port.set(port + 1);
        SocketAddrV4::new(self.address, port)
    }

    /// Writes a file below the scratch folder, readable by all.
    pub(crate) fn write(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        fs::create_dir_all(path.parent().expect("a folder")).expect(name);
        fs::write(&path, content).expect(name);
        path
    }

    /// A command with a small, known environment, the marker in it.
    pub(crate) fn command<S: AsRef<OsStr>>(&self, argv: impl IntoIterator<Item = S>) -> Command {
        let mut argv = argv.into_iter();
        let mut command = Command::new(argv.next().expect("a program's name"));
        let (name, value) = self.marker.split_once('=').expect("name=value");
        command.args(argv).current_dir(self.folder.path()).process_group(0).env_clear();
        command
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("LC_ALL", "C")
            .env("HOME", self.folder.path())
            .env(name, value);
        command
    }

    /// Starts a server, its output in NAME.log, and waits until it listens. `listens` is looked up in the kernel's table, not dialled:
    /// a probe would be a session.
    #[track_caller]
    pub(crate) fn start(&self, name: &str, command: &mut Command, listens: SocketAddrV4) {
        self.start_until(name, command, &format!("listen on {listens}"), || is_listening(listens));
    }

    /// The same for a server that is ready when `is_ready` says so; `what` it then does.
    #[track_caller]
    pub(crate) fn start_until(&self, name: &str, command: &mut Command, what: &str, is_ready: impl Fn() -> bool) {
        let path = self.path(&format!("{name}.log"));
        let log = File::create(&path).expect("a log");
        self.shows(path);
        command.stdin(Stdio::null()).stdout(log.try_clone().expect("a log")).stderr(log);
        let mut child = spawn(command);
        let outcome = wait_for(&format!("{name} to {what}"), || {
            if is_ready() {
                return Some(None);
            }
            child.try_wait().expect("wait").map(Some)
        });
        self.daemons.borrow_mut().push((name.to_owned(), child));
        assert!(outcome.is_none(), "{name} ended at once ({outcome:?}):\n{}", self.log(name));
    }

    /// Runs a program to its end with `input` on stdin.
    #[track_caller]
    pub(crate) fn run(&self, command: &mut Command, input: &[u8]) -> Finished {
        let mut stdin = tempfile::tempfile().expect("a file for stdin");
        std::io::Write::write_all(&mut stdin, input).expect("input");
        std::io::Seek::rewind(&mut stdin).expect("input");
        let output = tempfile::NamedTempFile::new_in(self.folder.path()).expect("a file for the output");
        let both = output.reopen().expect("output");
        command.stdin(stdin).stdout(both.try_clone().expect("output")).stderr(both);
        let what = format!("{command:?} to end");
        let mut child = Group(spawn(command));
        let status = wait_for(&what, || child.0.try_wait().expect("wait"));
        Finished { status, output: String::from_utf8_lossy(&fs::read(output.path()).expect("output")).into_owned() }
    }

    /// A file to print if the test fails.
    pub(crate) fn shows(&self, log: PathBuf) {
        self.logs.borrow_mut().push(log);
    }

    /// What the server of that name has written so far.
    pub(crate) fn log(&self, name: &str) -> String {
        let bytes = fs::read(self.path(&format!("{name}.log"))).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The process of the server of that name.
    pub(crate) fn pid(&self, name: &str) -> Pid {
        let daemons = self.daemons.borrow();
        Pid::from_child(&daemons.iter().find(|(this, _)| this == name).expect(name).1)
    }

    /// Waits until the server of that name has ended by itself.
    #[track_caller]
    pub(crate) fn wait_until_ended(&self, name: &str) -> ExitStatus {
        let mut daemons = self.daemons.borrow_mut();
        let daemon = &mut daemons.iter_mut().find(|(this, _)| this == name).expect(name).1;
        wait_for(&format!("{name} to end"), || daemon.try_wait().expect("wait"))
    }

    /// Waits until a server has no child left, neither running nor a zombie: each session it started is over and reaped.
    #[track_caller]
    pub(crate) fn wait_until_childless(&self, name: &str) {
        let pid = self.daemons.borrow().iter().find(|(this, _)| this == name).expect(name).1.id();
        wait_for(&format!("the sessions of {name} to end"), || {
            let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).expect(name);
            children.trim().is_empty().then_some(())
        });
    }

    /// The processes of this stage whose name, as the kernel cuts it at 15 octets, begins so.
    pub(crate) fn processes_named(&self, name: &str) -> Vec<i32> {
        let of_that_name = |pid: &Pid| {
            let comm = fs::read_to_string(format!("/proc/{}/comm", pid.as_raw_nonzero())).unwrap_or_default();
            comm.starts_with(name).then(|| pid.as_raw_nonzero().get())
        };
        self.inhabitants().iter().filter_map(of_that_name).collect()
    }

    /// Every process of this stage: those that carry its marker, and those in a chroot below its folder.
    fn inhabitants(&self) -> Vec<Pid> {
        let marks = |pid: &str| {
            let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            let rooted =
                fs::read_link(format!("/proc/{pid}/root")).is_ok_and(|root| root.starts_with(self.folder.path()));
            rooted || environment.split(|&b| b == 0).any(|variable| variable == self.marker.as_bytes())
        };
        let entries =
            fs::read_dir("/proc").expect("/proc").filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        entries.filter(|pid| marks(pid)).filter_map(|pid| Pid::from_raw(pid.parse().ok()?)).collect()
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for path in self.logs.borrow().iter() {
                eprintln!("---- {}\n{}", path.display(), String::from_utf8_lossy(&fs::read(path).unwrap_or_default()));
            }
        }
        for (_, mut child) in self.daemons.borrow_mut().drain(..) {
            end_group(&mut child);
        }
        wait_until(PATIENCE, || {
            let left = self.inhabitants();
            for pid in &left {
                let _ = kill_process(*pid, Signal::KILL);
            }
            left.is_empty()
        });
    }
}

/// A program's process group, ended and reaped whatever becomes of the test.
struct Group(Child);

impl Drop for Group {
    fn drop(&mut self) {
        end_group(&mut self.0);
    }
}

fn end_group(child: &mut Child) {
    if let Some(group) = Pid::from_raw(child.id() as i32) {
        let _ = kill_process_group(group, Signal::KILL);
    }
    let _ = child.wait();
}

#[track_caller]
fn spawn(command: &mut Command) -> Child {
    match command.spawn() {
        Ok(child) => child,
        Err(error) => panic!("{command:?}: {error}; scripts/setup installs what the tests need"),
    }
}

/// Whether /proc/net/tcp has a listening socket (state 0A) on just this address.
pub(crate) fn is_listening(at: SocketAddrV4) -> bool {
    let local = format!(" {:08X}:{:04X} ", u32::from_ne_bytes(at.ip().octets()), at.port());
    let table = fs::read_to_string("/proc/net/tcp").expect("/proc/net/tcp");
    table.lines().any(|line| line.contains(&local) && line.split_whitespace().nth(3) == Some("0A"))
}
