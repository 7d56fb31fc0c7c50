//! From `main` to an exit code.

use std::process::ExitCode;

use clap::Parser;
use tracing_subscriber::EnvFilter;

use crate::{Common, Context, Exit, Failure, LogFormat};

/// Parses the flags, runs `run`, and turns what it says into an exit code. The whole body of every `main`.
pub fn launch<A>(run: impl FnOnce(A, &Context) -> Result<Exit, Failure>) -> ExitCode
where
    A: Parser + AsRef<Common>,
{
    let args = A::parse();
    let common = args.as_ref().clone();
    let context = Context::new(&common);
    trace_to_stderr(&common);
    let exit = set_threads(&common).and_then(|()| run(args, &context)).unwrap_or_else(|failure| {
        context.error(&failure.message, failure.hint.as_deref());
        failure.exit
    });
    exit.into()
}

fn set_threads(common: &Common) -> Result<(), Failure> {
    let Some(threads) = common.threads else {
        return Ok(());
    };
    if threads == 0 {
        return Err(
            Failure::usage("`--threads 0` leaves nobody to work").hint("leave the flag out")
        );
    }
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build_global()
        .map_err(|e| Failure::environment(format!("cannot start {threads} threads: {e}")))
}

/// Diagnostics for developers: spans and events of the libraries, as `HONE_LOG` asks (`HONE_LOG=hone=debug`); warnings otherwise.
fn trace_to_stderr(common: &Common) {
    let filter = EnvFilter::try_from_env("HONE_LOG").unwrap_or_else(|_| EnvFilter::new("warn"));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    // Set once per process; a second launch inside one process (a test) keeps the first.
    let _ = match common.log_format {
        LogFormat::Text => builder.try_init(),
        LogFormat::Json => builder.json().try_init(),
    };
}
