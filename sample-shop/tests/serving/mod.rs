//! Starts `serve` as separate processes and sends requests to them, for tests with one process or several.
#![allow(clippy::unwrap_used, dead_code)]

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpStream},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use serde_json::Value;

/// The time limit for each step. On an idle machine, no step takes nearly as long.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// A `serve` process that answers HTTP. Dropping the value kills the process.
pub struct Serving {
    child: Child,
    pub at: SocketAddr,
    /// The arguments of the process, without the HTTP address.
    arguments: Vec<String>,
    /// The file that receives the standard error of the process.
    said: tempfile::NamedTempFile,
}

/// The answer to a request.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    /// The header names in lower case.
    pub headers: Vec<(String, String)>,
    pub text: String,
}

impl Serving {
    /// Starts one service, or all of them, on a store and a bus. Waits until the process prints its address.
    pub fn start(role: &str, store: &str, bus: &str) -> Self {
        // Only the tests of stopping have clients that stay connected after the stop signal.
        Self::start_with_grace(role, store, bus, "0s")
    }

    /// Starts a service that keeps accepting requests for `grace` after a request to stop.
    pub fn start_with_grace(role: &str, store: &str, bus: &str, grace: &str) -> Self {
        let arguments = ["serve", role, "--store", store, "--bus", bus, "--grace", grace].map(str::to_owned).to_vec();
        Self::start_at(arguments, "127.0.0.1:0")
    }

    /// Starts all four services in one process, on the local bus.
    pub fn all(store: &str) -> Self {
        Self::start("all", store, "local:")
    }

    fn start_at(arguments: Vec<String>, address: &str) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sample-shop"));
        command.args(&arguments).args(["--http", address]).stdout(Stdio::piped());
        let said = tempfile::NamedTempFile::new().unwrap();
        command.env("RUST_LOG", "warn").stderr(said.reopen().unwrap());
        let mut child = command.spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let line = lines.next().unwrap_or_else(|| panic!("{arguments:?} ended")).unwrap();
        let at =
            line.split("http://").nth(1).and_then(|rest| rest.split(',').next()).unwrap_or_else(|| panic!("{line}"));
        Self { child, at: at.parse().unwrap(), arguments, said }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.at)
    }

    pub fn signal(&self, name: &str) {
        let sent = Command::new("kill").args([&format!("-{name}"), &self.child.id().to_string()]).status().unwrap();
        assert!(sent.success(), "the process had ended before {name} was sent");
    }

    /// Returns what the process has printed to its standard error.
    pub fn said(&self) -> String {
        std::fs::read_to_string(self.said.path()).unwrap()
    }

    /// Starts the next instance at the same address.
    pub fn start_next(&self) -> Self {
        Self::start_at(self.arguments.clone(), &self.at.to_string())
    }

    /// Stops the process as an operator does, and asserts that it prints no warning about the stop. The simulated payment
    /// provider may still be busy, which is a warning about a step.
    pub fn stop(&mut self, signal: &str) {
        self.signal(signal);
        assert_eq!(self.code(), Some(if signal == "INT" { 130 } else { 143 }));
        let said = self.said();
        let (_, after) = said.split_once("stopping: ").unwrap_or_else(|| panic!("{said}"));
        let about_the_stop = after.lines().skip(1).filter(|line| !line.contains("a step failed and will be retried"));
        assert_eq!(about_the_stop.collect::<Vec<_>>(), [""; 0], "{:?}: {said}", self.arguments);
    }

    /// Stops the process as an operator does, and starts it again on the same address.
    pub fn stop_and_restart(mut self) -> Self {
        self.stop("TERM");
        Self::start_at(self.arguments.clone(), &self.at.to_string())
    }

    /// Ends the process as a power failure does, and starts it again on the same address.
    pub fn kill_and_restart(mut self) -> Self {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        Self::start_at(self.arguments.clone(), &self.at.to_string())
    }

    /// Waits, up to a time limit, for the process to end. Returns its exit code.
    pub fn code(&mut self) -> Option<i32> {
        let started = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            assert!(started.elapsed() < PATIENCE, "the process never ends");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Sends one request on a new connection.
    pub fn ask(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Answer {
        self.try_ask(method, path, headers, body).expect("no answer")
    }

    /// Sends a request to a server that may be about to end.
    pub fn try_ask(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Option<Answer> {
        let mut request = format!("{method} {path} HTTP/1.1\r\nhost: shop\r\nconnection: close\r\n");
        headers.iter().for_each(|(name, value)| request += &format!("{name}: {value}\r\n"));
        request += &format!("content-length: {}\r\n\r\n{body}", body.len());
        let mut stream = TcpStream::connect(self.at).ok()?;
        stream.set_read_timeout(Some(PATIENCE)).ok()?;
        _ = stream.write_all(request.as_bytes());
        read_answer(&mut stream)
    }

    /// Sends raw bytes, and returns the answer.
    pub fn send(&self, bytes: &[u8]) -> Answer {
        let mut stream = self.connect();
        // The server may answer and close the connection before it has read all bytes.
        _ = stream.write_all(bytes);
        read_answer(&mut stream).expect("no answer")
    }

    pub fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.at).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    pub fn get(&self, path: &str) -> Answer {
        self.ask("GET", path, &[], "")
    }

    pub fn post(&self, path: &str, key: &str, body: &Value) -> Answer {
        let headers = [("content-type", "application/json"), ("idempotency-key", key)];
        self.ask("POST", path, &headers, &body.to_string())
    }

    /// Returns a `run --http` command that uses this process as its shop.
    pub fn customer(&self, arguments: &[&str]) -> Command {
        self.customer_at(&self.url(), arguments)
    }

    /// Returns the same command, but with the URL of a proxy in front of the shop.
    pub fn customer_at(&self, url: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sample-shop"));
        command.args(["run", "--json", "--quiet", "--http", url]).args(arguments);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    pub fn buy(&self, arguments: &[&str]) -> Output {
        self.customer(arguments).output().unwrap()
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        _ = self.child.kill();
        _ = self.child.wait();
    }
}

/// Reads until the connection is closed. Returns `None` if the bytes are not a complete answer.
pub fn read_answer(stream: &mut TcpStream) -> Option<Answer> {
    let mut bytes = Vec::new();
    // A connection reset after the answer counts as the end of the answer.
    _ = stream.read_to_end(&mut bytes);
    let text = String::from_utf8(bytes).unwrap();
    let (head, body) = text.split_once("\r\n\r\n")?;
    let mut lines = head.lines();
    let status = lines.next().and_then(|line| line.split(' ').nth(1)).unwrap().parse().unwrap();
    let headers = lines.filter_map(|line| line.split_once(": "));
    let headers = headers.map(|(name, value)| (name.to_lowercase(), value.to_owned())).collect();
    let answer = Answer { status, headers, text: body.to_owned() };
    let whole = answer.header("content-length").is_none_or(|length| length.parse() == Ok(body.len()));
    whole.then_some(answer)
}

/// A connection that stays open between requests, for a client that knows only HTTP.
pub struct KeepAlive {
    at: SocketAddr,
    open: Option<BufReader<TcpStream>>,
}

/// The outcome of a request.
#[derive(Debug)]
pub enum Asked {
    Answered(Answer),
    /// The connection was refused, so nothing was sent and the client tries another address.
    Refused,
    /// The request was sent, but no complete answer came.
    Lost,
}

impl KeepAlive {
    pub fn new(at: SocketAddr) -> Self {
        Self { at, open: None }
    }

    pub fn ask(&mut self, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Asked {
        let mut stream = match self.open.take().filter(is_open) {
            Some(stream) => stream,
            None => match TcpStream::connect(self.at) {
                Ok(stream) => BufReader::new(stream),
                Err(_) => return Asked::Refused,
            },
        };
        let mut request = format!("{method} {path} HTTP/1.1\r\nhost: shop\r\n");
        headers.iter().for_each(|(name, value)| request += &format!("{name}: {value}\r\n"));
        request += &format!("content-length: {}\r\n\r\n{body}", body.len());
        stream.get_ref().set_read_timeout(Some(PATIENCE)).unwrap();
        if stream.get_mut().write_all(request.as_bytes()).is_err() {
            return Asked::Lost;
        }
        let Some(answer) = read_one(&mut stream) else { return Asked::Lost };
        if answer.header("connection") != Some("close") {
            self.open = Some(stream);
        }
        Asked::Answered(answer)
    }
}

/// Returns whether the server keeps the connection open.
fn is_open(stream: &BufReader<TcpStream>) -> bool {
    let stream = stream.get_ref();
    stream.set_nonblocking(true).unwrap();
    let open = stream.peek(&mut [0]).is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock);
    stream.set_nonblocking(false).unwrap();
    open
}

/// Reads one answer, up to its declared length.
fn read_one(stream: &mut BufReader<TcpStream>) -> Option<Answer> {
    let mut line = String::new();
    let mut next = |stream: &mut BufReader<TcpStream>| {
        line.clear();
        stream.read_line(&mut line).ok()?;
        line.ends_with("\r\n").then(|| line.trim_end().to_owned())
    };
    let status = next(stream)?.split(' ').nth(1)?.parse().ok()?;
    let mut headers = Vec::new();
    loop {
        let line = next(stream)?;
        match line.split_once(": ") {
            Some((name, value)) => headers.push((name.to_lowercase(), value.to_owned())),
            None => break,
        }
    }
    let mut answer = Answer { status, headers, text: String::new() };
    let mut body = vec![0; answer.header("content-length")?.parse().ok()?];
    stream.read_exact(&mut body).ok()?;
    answer.text = String::from_utf8(body).ok()?;
    Some(answer)
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    /// Asserts that the answer is a problem document (RFC 9457) with this status, and that its detail contains all
    /// `parts`.
    pub fn is_problem(&self, status: u16, parts: &[&str]) {
        assert_eq!((self.status, self.header("content-type")), (status, Some("application/problem+json")), "{self:?}");
        let problem = self.json();
        assert_eq!((&problem["status"], &problem["type"]), (&status.into(), &"about:blank".into()), "{self:?}");
        assert!(problem["title"].as_str().is_some_and(|title| !title.is_empty()), "{self:?}");
        let detail = problem["detail"].as_str().unwrap();
        for part in parts {
            assert!(detail.contains(part), "{part:?} is not in {detail:?}");
        }
    }
}
