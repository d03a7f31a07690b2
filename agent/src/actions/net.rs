//! Whether addresses accept connections.

use std::fmt;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::time::Duration;

use lockstep_proto::action::Address;
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout};

/// How an address answers a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Answer {
    /// It accepts.
    Accepts,
    /// It refuses: nothing listens.
    Refuses,
    /// Anything else, in words: the name is unknown, a packet filter is silent.
    Other(String),
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Accepts => f.write_str("accepts connections"),
            Self::Refuses => f.write_str("refuses connections"),
            Self::Other(words) => write!(f, "gives no answer: {words}"),
        }
    }
}

/// Between two questions.
pub(crate) const PAUSE: Duration = Duration::from_millis(100);

/// The longest time for one connection.
const PATIENCE: Duration = Duration::from_secs(5);

/// Connects once to everything that the name stands for. It accepts if any of them does; it
/// refuses only if one has said so and none is silent, for that one may yet accept.
pub(crate) async fn ask(address: &Address) -> Answer {
    let found = match tokio::net::lookup_host(&address.0).await {
        Ok(found) => found,
        Err(error) => return Answer::Other(format!("the name cannot be resolved: {error}")),
    };
    let mut refuses = false;
    let mut silent = None;
    let mut unreachable = None;
    for one in found {
        match connect(one).await {
            Tried::Accepts => return Answer::Accepts,
            Tried::Refuses => refuses = true,
            Tried::Silent(words) => silent = Some(words),
            Tried::NoWay(words) => unreachable = Some(words),
        }
    }
    match (silent, unreachable) {
        (Some(words), _) => Answer::Other(words),
        _ if refuses => Answer::Refuses,
        (None, Some(words)) => Answer::Other(words),
        (None, None) => Answer::Other("the name stands for no address".into()),
    }
}

/// Asks again until the answer is the wanted one or the time is over; gives the last answer.
pub(crate) async fn ask_until(address: &Address, wanted: &Answer, until: Instant) -> Answer {
    loop {
        let answer = ask(address).await;
        if answer == *wanted || Instant::now() + PAUSE >= until {
            return answer;
        }
        sleep(PAUSE).await;
    }
}

/// How one address answered.
enum Tried {
    Accepts,
    Refuses,
    Silent(String),
    /// This host has no way to it, such as to `::1` where IPv6 is off: it says nothing about the
    /// other side.
    NoWay(String),
}

async fn connect(address: SocketAddr) -> Tried {
    match timeout(PATIENCE, TcpStream::connect(address)).await {
        Err(_) => Tried::Silent(format!("{address} is silent for {PATIENCE:?}")),
        // A connection to a free port above 32767 may get that port as its own and meet itself.
        Ok(Ok(stream)) if stream.local_addr().ok() == Some(address) => Tried::Refuses,
        Ok(Ok(_)) => Tried::Accepts,
        Ok(Err(error)) => match error.kind() {
            ErrorKind::ConnectionRefused => Tried::Refuses,
            ErrorKind::AddrNotAvailable | ErrorKind::NetworkUnreachable => {
                Tried::NoWay(format!("{address}: {error}"))
            }
            // EAFNOSUPPORT: the kernel was built without this family.
            _ if error.raw_os_error() == Some(97) => Tried::NoWay(format!("{address}: {error}")),
            _ => Tried::Silent(format!("{address}: {error}")),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_port_accepts_while_something_listens_and_then_refuses() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        // `localhost` stands for an IPv6 address too, where nothing listens.
        let address = Address(format!("localhost:{port}"));
        assert_eq!(ask(&address).await, Answer::Accepts);
        drop(listener);
        assert_eq!(ask(&address).await, Answer::Refuses);
    }

    #[tokio::test]
    async fn an_unknown_name_neither_accepts_nor_refuses() {
        let answer = ask(&Address("no-such-host.invalid:80".into())).await;
        assert!(matches!(answer, Answer::Other(_)), "{answer:?}");
    }

    #[tokio::test]
    async fn waiting_ends_when_the_port_opens() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        drop(listener);
        let named = Address(address.to_string());
        let until = Instant::now() + Duration::from_secs(10);
        let (answer, _listener) = tokio::join!(ask_until(&named, &Answer::Accepts, until), async {
            sleep(Duration::from_millis(300)).await;
            tokio::net::TcpListener::bind(address).await.unwrap()
        });
        assert_eq!(answer, Answer::Accepts);
        assert!(Instant::now() < until);
    }
}
