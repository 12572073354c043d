//! What the host tells the guest's init, and what init answers.
//!
//! The order reaches the guest as one JSON file in the initramfs. Everything
//! later is JSON, one object a line, over a virtio-serial port.

use std::collections::BTreeMap;
use std::io::{self, BufRead, Write};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Name of the virtio-serial port that carries [`Event`] and [`Input`] lines.
pub const PORT: &str = "org.virtio-hmm.results";
/// Name of the port that carries [`Request`] and [`Answer`] lines.
pub const ACTION_PORT: &str = "org.virtio-hmm.actions";
/// Name under which the guest's first program asks the host for an [`Action`].
pub const ACTION_COMMAND: &str = "hmm-host";
/// Where the guest finds its [`Order`].
pub const ORDER_PATH: &str = "/etc/hmm-run.json";
/// Seconds between two [`Event::Alive`].
pub const ALIVE_SECONDS: u64 = 2;

/// What one boot is for.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Order {
    /// The program and its arguments.
    pub command: Vec<String>,
    /// Variables added to the program's environment.
    pub environment: BTreeMap<String, String>,
    /// Paths of modules of the kernel's own to load first, in this order.
    pub modules: Vec<String>,
    /// The driver to load then.
    pub driver: Option<Driver>,
    /// Run the program on the serial console, for a person.
    pub terminal: Option<Terminal>,
}

/// The device's driver.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Driver {
    /// Path of the `.ko` file in the guest.
    pub path: String,
    /// Parameters, as `insmod` takes them.
    pub parameters: String,
    /// Device nodes that show that the driver has found its devices.
    pub nodes: Vec<String>,
    /// Whether to unload it when the program has ended.
    pub unload: bool,
}

/// Size of the user's terminal, in characters.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Terminal {
    /// Lines.
    pub rows: u16,
    /// Characters in a line.
    pub columns: u16,
}

/// Bytes, base64 on the wire.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bytes(pub Vec<u8>);

impl Serialize for Bytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD.encode(&self.0))
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        STANDARD
            .decode(text)
            .map(Bytes)
            .map_err(serde::de::Error::custom)
    }
}

/// Which stream of the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// Guest to host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "lowercase")]
pub enum Event {
    /// Init runs.
    Boot {
        /// Release of the running kernel.
        kernel: String,
        /// Milliseconds since the kernel started.
        uptime_ms: u64,
    },
    /// The driver was loaded and has found its device.
    Driver,
    /// Init still runs.
    Alive,
    /// The program wrote this.
    Output {
        /// Where to.
        stream: Stream,
        /// What.
        data: Bytes,
    },
    /// What the driver has counted of a device since it was loaded. The program has ended, and
    /// whatever it has left behind.
    Counters {
        /// The driver's name for the device.
        device: String,
        /// As they are in debugfs: names and numbers.
        counters: String,
        /// The times of CPU faults, as they are in debugfs.
        fault_latency: String,
    },
    /// The driver was unloaded, or could not be.
    Unloaded {
        /// Why not.
        error: Option<String>,
    },
    /// The program ended; the guest powers off next.
    Exit {
        /// Its exit status, if it had one.
        status: Option<i32>,
        /// The signal that ended it otherwise.
        signal: Option<i32>,
    },
    /// Init itself failed; the guest powers off next.
    Error {
        /// Why.
        message: String,
    },
}

/// Host to guest: standard input of the program. Empty `data` is its end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Input {
    /// The next bytes.
    pub data: Bytes,
}

/// What a program in the guest can have the host do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// Unplug a device, and wait until the guest has let go of it.
    Unplug {
        /// Its slot, from 0.
        device: u32,
    },
    /// Plug a new device into a free slot.
    Plug {
        /// The slot.
        device: u32,
    },
    /// Kill the daemon of a device.
    Kill {
        /// Its slot.
        device: u32,
    },
    /// Stop the daemon of a device for a time.
    Pause {
        /// Its slot.
        device: u32,
        /// How long.
        seconds: u32,
    },
    /// Wake the machine up once it is suspended.
    Wake,
    /// Reset the machine, as its button does: it boots again, with the same command.
    Reset,
}

impl Action {
    /// What the words of the command say; `None` if they say nothing.
    #[must_use]
    pub fn parse(words: &[String]) -> Option<Self> {
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let number = |text: &str| text.parse().ok();
        Some(match words.as_slice() {
            ["unplug", device] => Self::Unplug {
                device: number(device)?,
            },
            ["plug", device] => Self::Plug {
                device: number(device)?,
            },
            ["kill", device] => Self::Kill {
                device: number(device)?,
            },
            ["pause", device, seconds] => Self::Pause {
                device: number(device)?,
                seconds: number(seconds)?,
            },
            ["wake"] => Self::Wake,
            ["reset"] => Self::Reset,
            _ => return None,
        })
    }
}

/// Guest to host: do this.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Comes back with the answer: whoever asked before may not have waited for his.
    pub id: u32,
    /// What to do.
    pub action: Action,
}

/// Host to guest: it is done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// Of the request.
    pub id: u32,
    /// Why it is not.
    pub error: Option<String>,
}

/// Writes one message as a line.
///
/// # Errors
/// The message could not be written.
pub fn send<T: Serialize>(port: &mut impl Write, message: &T) -> io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    port.write_all(&line)?;
    port.flush()
}

/// Reads one message; `None` at the end of the stream, also in the middle of a line.
///
/// # Errors
/// The stream could not be read, or its next line is no such message.
pub fn receive<T: for<'de> Deserialize<'de>>(port: &mut impl BufRead) -> io::Result<Option<T>> {
    let mut line = Vec::new();
    port.read_until(b'\n', &mut line)?;
    if line.last() != Some(&b'\n') {
        return Ok(None);
    }
    Ok(Some(serde_json::from_slice(&line)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_value_survives_the_port() {
        let data = Bytes((0..=255).collect());
        let mut wire = Vec::new();
        let sent = Event::Output {
            stream: Stream::Stderr,
            data,
        };
        send(&mut wire, &sent).unwrap();
        assert_eq!(wire.iter().filter(|&&b| b == b'\n').count(), 1);
        let mut port = wire.as_slice();
        assert_eq!(receive::<Event>(&mut port).unwrap(), Some(sent));
        assert_eq!(receive::<Event>(&mut port).unwrap(), None);
    }

    #[test]
    fn a_line_that_is_no_message_is_an_error() {
        assert!(receive::<Event>(&mut b"{\"event\":\"x\"}\n".as_slice()).is_err());
        assert!(receive::<Input>(&mut b"{\"data\":\"?\"}\n".as_slice()).is_err());
    }

    #[test]
    fn actions_are_read_from_words() {
        let parse = |text: &str| {
            let words: Vec<String> = text.split(' ').map(ToOwned::to_owned).collect();
            Action::parse(&words)
        };
        assert_eq!(parse("unplug 1"), Some(Action::Unplug { device: 1 }));
        assert_eq!(
            parse("pause 0 8"),
            Some(Action::Pause {
                device: 0,
                seconds: 8
            })
        );
        assert_eq!(parse("wake"), Some(Action::Wake));
        assert_eq!(parse("reset"), Some(Action::Reset));
        for text in ["", "unplug", "unplug -1", "wake 1", "pause 0", "reboot"] {
            assert_eq!(parse(text), None, "{text}");
        }
    }

    #[test]
    fn a_stream_that_ends_in_a_line_just_ends() {
        let cut = b"{\"data\":\"aG".as_slice();
        assert_eq!(receive::<Input>(&mut { cut }).unwrap(), None);
    }
}
