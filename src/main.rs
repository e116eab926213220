//! starttls-wrapper: arguments, logging, the door, the exit code; nothing else.

use std::io::Write;
use std::process::ExitCode;

use starttls_wrapper::check;
use starttls_wrapper::cli::{self, Invocation};
use starttls_wrapper::driver::{greeting, listen, ucspi};
use starttls_wrapper::error::{Fatal, exit};
use starttls_wrapper::logging;
use starttls_wrapper::sys::{exit_now, inherited};

/// rustls allocates for each record that it receives; musl's allocator would map and unmap memory each time.
#[cfg(target_env = "musl")]
#[global_allocator]
static ALLOCATOR: dlmalloc::GlobalDlmalloc = dlmalloc::GlobalDlmalloc;

fn main() -> ExitCode {
    let outcome = std::panic::catch_unwind(run).unwrap_or(Ok(exit::BUG));
    ExitCode::from(outcome.unwrap_or_else(|fatal| {
        // One line, whatever the log level: without it nobody would know why there is no service.
        let _ = writeln!(std::io::stderr(), "starttls-wrapper: {fatal}");
        fatal.exit_code()
    }))
}

fn run() -> Result<u8, Fatal> {
    inherited::keep_stderr_from_the_client().map_err(|error| ucspi::turn_away("look at stderr", error))?;
    match cli::read(std::env::args_os().skip(1), |name| std::env::var_os(name))? {
        Invocation::Print(text) => {
            let printed = std::io::stdout().write_all(text.as_bytes());
            printed.map_err(|error| Fatal::System("write to stdout", error))?;
            Ok(exit::OVER)
        }
        Invocation::Check(config) => check::run(&config),
        Invocation::Probe(probe) => {
            logging::init(probe.verbosity);
            greeting::probe(&probe)
        }
        Invocation::Serve(config) => {
            logging::init(config.verbosity);
            let code = match config.listen.clone() {
                Some(listen) => listen::serve(*config, &listen)?,
                None => ucspi::serve(*config)?,
            };
            // All is closed and said. Exit handlers (aws-lc's) would only wake more of the program.
            exit_now(code)
        }
    }
}
