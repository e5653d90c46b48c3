//! The command line.

mod bus_url;
mod store_url;

use std::{ffi::OsString, fmt, net::SocketAddr, path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand, ValueEnum};

pub use self::{
    bus_url::{BusUrl, BusUrlError},
    store_url::{StoreUrl, StoreUrlError},
};
use shop_driver::{
    input::{InputError, Source, StockFactor},
    over_http::HttpUrl,
};

/// The number of orders that `run` generates if the command line names neither a file nor a number.
pub const GENERATED_DEFAULT: u64 = 2_000;
/// The share of declined cards among generated orders.
pub const DECLINE_RATE_GENERATED: f64 = 0.1;
/// The share of customers who cancel among generated orders.
pub const CANCEL_RATE_GENERATED: f64 = 0.02;

/// How long `serve` keeps accepting requests after a request to stop. Load balancers probe only every few seconds, and
/// a client with an open connection learns of the stop from its next answer. This time is short, because Kubernetes by
/// default kills a process 30 seconds after the request to stop. The last answers and draining the services need time
/// after the grace as well: usually little, at most 30 seconds.
const GRACE_DEFAULT: &str = "5s";
/// The longest grace, in seconds. No load balancer needs more, and a typing error must not keep a process alive for
/// hours.
const GRACE_SECONDS_MAX: u32 = 300;

const EXAMPLES: &str = "Examples:
  sample-shop run
      2,000 generated orders through all four services, in shop.db, with nothing else installed
  sample-shop run --orders online-retail-2010-12.csv --stock-factor 0.9
      real orders, with a tenth too little stock
  sample-shop run --generate 10000 --seed 42 --store memory: --json
      the same orders and the same bad luck each time, and one line of JSON
  sample-shop drain
      wait for the sagas that an earlier run left unfinished in shop.db";

const SERVE_EXAMPLES: &str = "Examples:
  sample-shop serve all --store sqlite:shop.db --bus local: --http 127.0.0.1:8080
      all four services in this process
  sample-shop run --http http://127.0.0.1:8080 --generate 1000
      a thousand orders for that shop, from another terminal";

/// A shop of four services (order, inventory, payment, notification) whose checkout is a saga.
#[derive(Clone, Debug, Parser)]
#[command(name = "sample-shop", version, after_help = EXAMPLES)]
pub struct Arguments {
    /// The command to run.
    #[command(subcommand)]
    pub command: Command,
}

impl Arguments {
    /// Reads a command line. An error quotes the arguments, but leaves out every part that may be a password.
    pub fn read(words: impl IntoIterator<Item = impl Into<OsString> + Clone>) -> Result<Self, clap::Error> {
        Self::try_parse_from(words).map_err(annals_cli::quoted::without_passwords)
    }
}

/// The commands of the shop.
#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    /// Run orders through the whole shop in this process, and report how they ended.
    #[command(after_help = EXAMPLES)]
    Run(Run),
    /// Run one service, or all of them, until the process is asked to stop.
    ///
    /// Reports errors and parked messages on standard error. With RUST_LOG=info, reports more.
    #[command(after_help = SERVE_EXAMPLES)]
    Serve(Serve),
    /// Wait until every saga has ended, then print the summary.
    Drain(Drain),
    /// Run the `annals` command on the shop's store: inspect, replay, verify, move and repair. Needs a build with the
    /// feature `ops`.
    #[command(disable_help_flag = true)]
    Ops {
        /// The command and its arguments; see `ops --help`.
        #[arg(value_name = "WORDS", trailing_var_arg = true, allow_hyphen_values = true)]
        words: Vec<OsString>,
    },
}

/// The store and the bus.
#[derive(Clone, Debug, Args)]
pub struct Connection {
    /// The store of the events: `memory:`, `sqlite:PATH` or `postgres://…`. A password can come from a file or the
    /// environment: `?password_file=PATH`, `?password_env=VARIABLE`, PGPASSWORD or PGPASSFILE.
    #[arg(long, value_name = "URL", default_value = "sqlite:shop.db")]
    pub store: StoreUrl,
    /// The bus between the services: `local:` (inside this process) or `kafka://host:port[,host:port][?name=value&…]`.
    /// Any value can come from a file or the environment: `?sasl.password_file=PATH`, `?sasl.password_env=VARIABLE`.
    #[arg(long, value_name = "URL", default_value = "local:")]
    pub bus: BusUrl,
    /// The name of this process, if several processes share one PostgreSQL. A process that is restarted with the same
    /// name gets its share of the work back at once [default: a new name each time].
    #[arg(long, value_name = "NAME", value_parser = instance)]
    pub instance: Option<String>,
}

impl Connection {
    /// The name under which this process shares work with other processes; `None` if no other process uses the store.
    pub fn shared_as(&self) -> Option<String> {
        shared_as(&self.store, &self.instance)
    }
}

fn shared_as(store: &StoreUrl, instance: &Option<String>) -> Option<String> {
    let name = || format!("shop-{:08x}", fastrand::u32(..));
    store.is_shared().then(|| instance.clone().unwrap_or_else(name))
}

/// The output options.
#[derive(Clone, Copy, Debug, Args)]
pub struct Output {
    /// Print the summary as JSON on the last line.
    #[arg(long)]
    pub json: bool,
    /// Show no progress.
    #[arg(long)]
    pub quiet: bool,
}

/// Arguments of `run`.
#[derive(Clone, Debug, Args)]
pub struct Run {
    /// Be a customer of the shop that answers HTTP at this URL, instead of running a shop.
    #[arg(long, value_name = "URL", conflicts_with_all = ["store", "bus", "instance"])]
    pub http: Option<HttpUrl>,
    /// Read the invoices from this CSV file.
    #[arg(long, value_name = "FILE.csv", conflicts_with = "generate")]
    pub orders: Option<PathBuf>,
    /// Generate this many orders [default: 2000].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub generate: Option<u64>,
    /// The store and the bus.
    #[command(flatten)]
    pub connection: Connection,
    /// The maximum number of orders and returns in progress.
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub concurrency: u32,
    /// Start each SKU with this many times the units that the input will take, rounded up.
    #[arg(long, value_name = "F", default_value = "1", allow_negative_numbers = true)]
    pub stock_factor: StockFactor,
    /// The share of declined cards, 0 to 1 [default: 0 for a file, 0.1 for generated orders].
    #[arg(long, value_name = "P", value_parser = rate, allow_negative_numbers = true)]
    pub decline_rate: Option<f64>,
    /// The share of customers who cancel while their checkout runs, 0 to 1 [default: 0 for a file, 0.02 for generated
    /// orders].
    #[arg(long, value_name = "P", value_parser = rate, allow_negative_numbers = true)]
    pub cancel_rate: Option<f64>,
    /// The seed of all random choices.
    #[arg(long, value_name = "N", default_value_t = 7)]
    pub seed: u64,
    /// The output options.
    #[command(flatten)]
    pub output: Output,
}

impl Run {
    /// Opens the file, or generates the orders.
    pub fn source(&self) -> Result<Source, InputError> {
        match &self.orders {
            Some(path) => Source::file(path),
            None => Ok(Source::generated(self.generate.unwrap_or(GENERATED_DEFAULT), self.seed)),
        }
    }

    /// The share of declined cards.
    pub fn decline_rate(&self) -> f64 {
        self.decline_rate.unwrap_or(if self.orders.is_some() { 0.0 } else { DECLINE_RATE_GENERATED })
    }

    /// The share of customers who cancel while their checkout runs.
    pub fn cancel_rate(&self) -> f64 {
        self.cancel_rate.unwrap_or(if self.orders.is_some() { 0.0 } else { CANCEL_RATE_GENERATED })
    }
}

/// Arguments of `serve`. Store and bus have no default, because served events must outlive the process.
#[derive(Clone, Debug, Args)]
pub struct Serve {
    /// The service to run.
    #[arg(value_name = "SERVICE")]
    pub role: Role,
    /// The store of the events: `memory:`, `sqlite:PATH` or `postgres://…`. A password can come from a file or the
    /// environment: `?password_file=PATH`, `?password_env=VARIABLE`, PGPASSWORD or PGPASSFILE.
    #[arg(long, value_name = "URL")]
    pub store: StoreUrl,
    /// The bus between the services: `local:` (inside this process) or `kafka://host:port[,host:port][?name=value&…]`.
    /// Any value can come from a file or the environment: `?sasl.password_file=PATH`, `?sasl.password_env=VARIABLE`.
    #[arg(long, value_name = "URL")]
    pub bus: BusUrl,
    /// Answer HTTP at this address, such as 127.0.0.1:8080; port 0 means any free port. Any client that reaches the
    /// address may do everything.
    #[arg(long, value_name = "ADDR")]
    pub http: Option<SocketAddr>,
    /// How long to keep accepting requests after a request to stop, so that load balancers and clients can switch to
    /// another process before the address is closed: 0s to 300s.
    #[arg(long, value_name = "TIME", value_parser = grace, default_value = GRACE_DEFAULT)]
    pub grace: Duration,
    /// The name of this process, if several processes of its service share one PostgreSQL. A process that is restarted
    /// with the same name gets its share of the work back at once [default: a new name each time].
    #[arg(long, value_name = "NAME", value_parser = instance)]
    pub instance: Option<String>,
}

impl Serve {
    /// The name under which this process shares work with other processes; `None` if no other process uses the store.
    pub fn shared_as(&self) -> Option<String> {
        shared_as(&self.store, &self.instance)
    }
}

/// What `serve` runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Role {
    /// All four services.
    All,
    /// Orders, returns, and their sagas.
    Order,
    /// Stock and supplies.
    Inventory,
    /// Charges and refunds.
    Payment,
    /// Messages to customers.
    Notification,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::All => "all",
            Self::Order => "order",
            Self::Inventory => "inventory",
            Self::Payment => "payment",
            Self::Notification => "notification",
        })
    }
}

/// Arguments of `drain`.
#[derive(Clone, Debug, Args)]
pub struct Drain {
    /// The store of the sagas.
    #[command(flatten)]
    pub connection: Connection,
    /// The output options.
    #[command(flatten)]
    pub output: Output,
}

fn instance(text: &str) -> Result<String, String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if text.is_empty() || text.len() > 100 || !text.chars().all(plain) {
        return Err("an instance is named by up to 100 letters, digits, '-', '_' and '.'".into());
    }
    Ok(text.to_owned())
}

fn grace(text: &str) -> Result<Duration, String> {
    let seconds =
        text.strip_suffix('s').unwrap_or(text).parse::<u32>().ok().filter(|seconds| *seconds <= GRACE_SECONDS_MAX);
    let wrong = || format!("must be a number of seconds up to {GRACE_SECONDS_MAX}, such as {GRACE_DEFAULT}");
    seconds.map(|seconds| Duration::from_secs(seconds.into())).ok_or_else(wrong)
}

fn rate(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(rate) if (0.0..=1.0).contains(&rate) => Ok(rate),
        _ => Err("must be a number from 0 to 1, such as 0.1".to_owned()),
    }
}

#[cfg(test)]
mod tests;
