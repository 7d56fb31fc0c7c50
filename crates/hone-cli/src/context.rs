//! Talk on stderr, data on stdout, signals.

use std::io::{IsTerminal, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};

use crate::text::visible;
use crate::{Common, Exit, LogFormat};

/// Time between two progress lines where there is no terminal.
const PLAIN_INTERVAL: Duration = Duration::from_secs(10);

/// What a running program talks through. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Context {
    bars: MultiProgress,
    form: Form,
    interrupted: Arc<AtomicBool>,
    terminated: Arc<AtomicBool>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Terminal,
    Plain,
    Json,
    Quiet,
}

impl Context {
    /// Sets up stderr as `common` says, and the signal flags: the first SIGINT or SIGTERM asks to stop, the second ends at once.
    pub fn new(common: &Common) -> Self {
        let form = match (common.quiet, common.log_format) {
            (true, _) => Form::Quiet,
            (_, LogFormat::Json) => Form::Json,
            _ if std::io::stderr().is_terminal() => Form::Terminal,
            _ => Form::Plain,
        };
        let target = match form {
            Form::Terminal => ProgressDrawTarget::stderr(),
            _ => ProgressDrawTarget::hidden(),
        };
        let context = Context {
            bars: MultiProgress::with_draw_target(target),
            form,
            interrupted: Arc::default(),
            terminated: Arc::default(),
        };
        context.register(SIGINT, Exit::Interrupted, &context.interrupted);
        context.register(SIGTERM, Exit::Terminated, &context.terminated);
        context
    }

    fn register(&self, signal: i32, exit: Exit, flag: &Arc<AtomicBool>) {
        // Refused only for signals that cannot be caught, and these two can.
        let _ = signal_hook::flag::register_conditional_shutdown(signal, exit as i32, flag.clone());
        let _ = signal_hook::flag::register(signal, flag.clone());
    }

    /// Which stop a signal has asked for, if one has.
    pub fn stop(&self) -> Option<Exit> {
        if self.interrupted.load(Ordering::Relaxed) {
            Some(Exit::Interrupted)
        } else if self.terminated.load(Ordering::Relaxed) {
            Some(Exit::Terminated)
        } else {
            None
        }
    }

    /// A flag that SIGUSR1 sets from now on, instead of ending the program: to save what there is and go on.
    pub fn save_signal(&self) -> Arc<AtomicBool> {
        let flag = Arc::default();
        // Refused only for signals that cannot be caught, and this one can.
        let _ = signal_hook::flag::register(SIGUSR1, Arc::clone(&flag));
        flag
    }

    /// Whether a signal has asked to stop.
    pub fn stop_requested(&self) -> bool {
        self.stop().is_some()
    }

    /// Says a line to people.
    pub fn note(&self, line: impl AsRef<str>) {
        self.say("info", line.as_ref(), None);
    }

    /// Says a line to people that they should not miss.
    pub fn warn(&self, line: impl AsRef<str>) {
        self.say("warning", line.as_ref(), None);
    }

    /// Says why the program fails; even when it was told to be quiet.
    pub fn error(&self, line: &str, hint: Option<&str>) {
        self.say("error", line, hint);
    }

    fn say(&self, level: &str, line: &str, hint: Option<&str>) {
        if self.form == Form::Quiet && level != "error" {
            return;
        }
        let text = if self.form == Form::Json {
            let mut object = serde_json::json!({"level": level, "message": line});
            if let Some(hint) = hint {
                object["hint"] = hint.into();
            }
            format!("{object}\n")
        } else {
            let prefix = if level == "info" { String::new() } else { format!("{level}: ") };
            let hint = hint.map_or_else(String::new, |hint| format!("hint: {hint}\n"));
            // A message may name what a row says, and that must not drive the terminal.
            visible(&format!("{prefix}{line}\n{hint}"))
        };
        self.bars.suspend(|| {
            // A closed stderr is no reason to stop working.
            let _ = std::io::stderr().lock().write_all(text.as_bytes());
        });
    }

    /// Prints data on stdout, with a line end. A closed pipe (`| head`) ends the talk, not the program.
    pub fn print(&self, data: impl AsRef<str>) {
        self.bars.suspend(|| {
            let mut out = std::io::stdout().lock();
            let _ = writeln!(out, "{}", data.as_ref()).and_then(|()| out.flush());
        });
    }

    /// A progress bar over `total` things, such as `rows`; plain lines now and then where there is no terminal.
    pub fn progress(&self, total: u64, things: &'static str) -> Progress {
        let bar = ProgressBar::new(total);
        let style = ProgressStyle::with_template(
            "{bar:30} {pos}/{len} {prefix}  {elapsed} of about {duration}  {msg}",
        )
        .expect("the template is a constant and fits indicatif's grammar");
        bar.set_style(style);
        bar.set_prefix(things);
        let bar = self.bars.add(bar);
        if self.form == Form::Terminal {
            bar.enable_steady_tick(Duration::from_millis(200));
        }
        Progress { bar, context: self.clone(), things, said: Instant::now() }
    }
}

/// How far a piece of work has come.
#[derive(Debug)]
pub struct Progress {
    bar: ProgressBar,
    context: Context,
    things: &'static str,
    said: Instant,
}

impl Progress {
    /// `n` more are done.
    pub fn inc(&mut self, n: u64) {
        self.bar.inc(n);
        self.plain();
    }

    /// `n` are done, from a resumed run say.
    pub fn set(&mut self, n: u64) {
        self.bar.set_position(n);
        self.bar.reset_eta();
        self.plain();
    }

    /// What stands behind the bar: a loss, a rate.
    pub fn message(&mut self, text: impl Into<String>) {
        self.bar.set_message(text.into());
    }

    fn plain(&mut self) {
        let is_lines = matches!(self.context.form, Form::Plain | Form::Json);
        if is_lines && self.said.elapsed() >= PLAIN_INTERVAL {
            self.said = Instant::now();
            let (done, total) = (self.bar.position(), self.bar.length().unwrap_or_default());
            let left = self.bar.eta().as_secs();
            let message = self.bar.message();
            let things = self.things;
            self.context.note(format!("{done}/{total} {things}, {left} s left  {message}"));
        }
    }

    /// Takes the bar away.
    pub fn finish(self) {
        self.bar.finish_and_clear();
    }
}
