//! QEMU's monitor protocol (QMP), as far as a run needs it.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::error::{Error, Result};

/// How long QEMU may take to answer a command.
const PATIENCE: Duration = Duration::from_secs(30);

/// A connection to QEMU's monitor.
#[derive(Debug)]
pub(crate) struct Qmp {
    to: UnixStream,
    from: Receiver<Value>,
    /// Events that came while something else was waited for.
    events: Vec<Value>,
}

impl Qmp {
    /// Takes the connection that QEMU made.
    pub(crate) fn start(stream: UnixStream) -> Result<Self> {
        let lines = BufReader::new(stream.try_clone().map_err(Error::Monitor)?).lines();
        let (to_self, from) = mpsc::channel();
        thread::spawn(move || {
            for line in lines.map_while(io::Result::ok) {
                let message = serde_json::from_str(&line).unwrap_or_default();
                if to_self.send(message).is_err() {
                    return;
                }
            }
        });
        let mut qmp = Self {
            to: stream,
            from,
            events: Vec::new(),
        };
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Has QEMU execute a command.
    ///
    /// # Errors
    /// QEMU refuses, with its reason, or does not answer.
    pub(crate) fn execute(&mut self, command: &str, arguments: Value) -> Result<()> {
        let line = json!({"execute": command, "arguments": arguments});
        writeln!(self.to, "{line}").map_err(Error::Monitor)?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let message = self.receive(deadline).map_err(Error::Monitor)?;
            if let Some(error) = message.get("error") {
                let reason = error.get("desc").and_then(Value::as_str);
                let reason = reason.unwrap_or_default().to_owned();
                return Err(Error::Refused {
                    command: command.to_owned(),
                    reason,
                });
            }
            if message.get("return").is_some() {
                return Ok(());
            }
            self.events.push(message);
        }
    }

    /// Forgets what has happened so far.
    pub(crate) fn forget_events(&mut self) {
        self.events.extend(self.from.try_iter());
        self.events.clear();
    }

    /// Waits for an event, with this value for `key` in its data if one is given.
    ///
    /// # Errors
    /// It does not happen within `patience`.
    pub(crate) fn wait_for(
        &mut self,
        event: &str,
        data: Option<(&str, &str)>,
        patience: Duration,
    ) -> io::Result<()> {
        let wanted = |message: &Value| {
            let is = |value: Option<&Value>, text| value.and_then(Value::as_str) == Some(text);
            is(message.get("event"), event)
                && data.is_none_or(|(key, value)| {
                    is(message.get("data").and_then(|data| data.get(key)), value)
                })
        };
        if let Some(at) = self.events.iter().position(wanted) {
            self.events.remove(at);
            return Ok(());
        }
        let deadline = Instant::now() + patience;
        loop {
            let message = self.receive(deadline)?;
            if wanted(&message) {
                return Ok(());
            }
            self.events.push(message);
        }
    }

    fn receive(&self, deadline: Instant) -> io::Result<Value> {
        let patience = deadline.saturating_duration_since(Instant::now());
        self.from
            .recv_timeout(patience)
            .map_err(|error| match error {
                RecvTimeoutError::Timeout => io::ErrorKind::TimedOut.into(),
                RecvTimeoutError::Disconnected => io::ErrorKind::ConnectionReset.into(),
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A monitor that says these lines, one after each that it reads.
    fn monitor(answers: &'static [&'static str]) -> Result<Qmp> {
        let (here, there) = UnixStream::pair().unwrap();
        thread::spawn(move || {
            let mut lines = BufReader::new(there.try_clone().unwrap()).lines();
            let mut there = there;
            writeln!(there, r#"{{"QMP": {{"version": {{}}}}}}"#).unwrap();
            for answer in answers {
                lines.next();
                writeln!(there, "{answer}").unwrap();
            }
            lines.next();
        });
        Qmp::start(here)
    }

    #[test]
    fn events_are_kept_for_whoever_waits_for_them() {
        let mut qmp = monitor(&[
            r#"{"return": {}}"#,
            "{\"event\": \"DEVICE_DELETED\", \"data\": {\"path\": \"/x\"}}\n\
             {\"event\": \"DEVICE_DELETED\", \"data\": {\"device\": \"hmm1\"}}\n\
             {\"return\": {}}",
        ])
        .unwrap();
        qmp.execute("device_del", json!({"id": "hmm1"})).unwrap();
        let data = Some(("device", "hmm1"));
        qmp.wait_for("DEVICE_DELETED", data, PATIENCE).unwrap();
        let again = qmp.wait_for("DEVICE_DELETED", data, Duration::from_millis(1));
        assert_eq!(again.unwrap_err().kind(), io::ErrorKind::TimedOut);
    }

    #[test]
    fn a_refusal_gives_its_reason() {
        let mut qmp = monitor(&[
            r#"{"return": {}}"#,
            r#"{"error": {"class": "GenericError", "desc": "Bus 'x' not found"}}"#,
        ])
        .unwrap();
        let error = qmp.execute("device_add", json!({})).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("device_add") && text.contains("Bus 'x' not found"));
    }
}
