//! `hmm-host`: the guest's first program under its second name, with which other programs
//! have the host do something.

use std::fs::File;
use std::io::BufReader;
use std::process::{self, ExitCode};

use hmm_init::{ACTION_COMMAND, ACTION_PORT, Action, Answer, Request, receive, send};

use crate::{Error, open_port, with_sources};

const USAGE: &str = "unplug N | plug N | kill N | pause N SECONDS | wake | reset";

/// Asks the host for what the words say, and waits until it is done.
pub(crate) fn ask(words: &[String]) -> ExitCode {
    let Some(action) = Action::parse(words) else {
        eprintln!("usage: {ACTION_COMMAND} {USAGE}");
        return ExitCode::from(2);
    };
    match perform(action) {
        Ok(None) => ExitCode::SUCCESS,
        Ok(Some(error)) => {
            eprintln!("{ACTION_COMMAND}: {error}");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("{ACTION_COMMAND}: {}", with_sources(&error));
            ExitCode::FAILURE
        }
    }
}

fn perform(action: Action) -> Result<Option<String>, Error> {
    let mut port: File = open_port(ACTION_PORT)?;
    let id = process::id();
    send(&mut port, &Request { id, action }).map_err(Error::Port)?;
    let mut port = BufReader::new(port);
    while let Some(answer) = receive::<Answer>(&mut port).map_err(Error::Port)? {
        if answer.id == id {
            return Ok(answer.error);
        }
    }
    Ok(Some("the host is gone".into()))
}
