//! The date that `strftime_now` sees: pinned, so that the same rows render to the same bytes
//! tomorrow.

use std::fmt::Write;

/// A moment, without a time zone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Date {
    year: u16,
    month: u8,
    day: u8,
    hour: u8,
    minute: u8,
    second: u8,
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];

const DAYS: [&str; 7] =
    ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

impl Date {
    /// Reads `2026-01-31` (midnight) or `2026-01-31T23:59:58`.
    ///
    /// # Errors
    /// A message that says which form is wanted.
    pub fn parse(text: &str) -> Result<Self, String> {
        let wanted = || format!("`{text}` is not a date such as 2026-01-31 or 2026-01-31T23:59:58");
        let (date, time) = text.split_once('T').unwrap_or((text, "00:00:00"));
        let fields = |part: &str, separator: char, widths: [usize; 3]| -> Option<[u16; 3]> {
            let pieces: Vec<&str> = part.split(separator).collect();
            let pieces: [&str; 3] = pieces.try_into().ok()?;
            let digits = |p: &&str| p.bytes().all(|b| b.is_ascii_digit());
            if !pieces.iter().all(digits) || pieces.map(str::len) != widths {
                return None;
            }
            let [a, b, c] = pieces.map(|piece| piece.parse().ok());
            Some([a?, b?, c?])
        };
        let [year, month, day] = fields(date, '-', [4, 2, 2]).ok_or_else(wanted)?;
        let [hour, minute, second] = fields(time, ':', [2, 2, 2]).ok_or_else(wanted)?;
        let is_date = (1..=12).contains(&month) && (1..=days_in(year, month)).contains(&day);
        if !is_date || year == 0 || hour > 23 || minute > 59 || second > 59 {
            return Err(wanted());
        }
        Ok(Date {
            year,
            month: month as u8,
            day: day as u8,
            hour: hour as u8,
            minute: minute as u8,
            second: second as u8,
        })
    }

    /// Formats as C's `strftime` does in the C locale; `None` names a directive that is not known
    /// here.
    pub(crate) fn format(&self, form: &str) -> Result<String, String> {
        let mut out = String::new();
        let mut chars = form.chars();
        while let Some(c) = chars.next() {
            if c != '%' {
                out.push(c);
                continue;
            }
            let (padded, directive) = match chars.next() {
                Some('-') => (false, chars.next()),
                other => (true, other),
            };
            self.directive(directive, padded, &mut out)
                .ok_or_else(|| format!("strftime_now: `{form}` has an unknown directive"))?;
        }
        Ok(out)
    }

    fn directive(&self, directive: Option<char>, padded: bool, out: &mut String) -> Option<()> {
        let month = MONTHS[usize::from(self.month) - 1];
        let day = DAYS[usize::from(self.weekday())];
        let hour12 = (self.hour + 11) % 12 + 1;
        let half = if self.hour < 12 { "AM" } else { "PM" };
        let (value, width) = match directive? {
            'Y' => (self.year, 0),
            'y' => (self.year % 100, 2),
            'm' => (self.month.into(), 2),
            'd' => (self.day.into(), 2),
            'H' => (self.hour.into(), 2),
            'I' => (hour12.into(), 2),
            'M' => (self.minute.into(), 2),
            'S' => (self.second.into(), 2),
            'j' => (self.day_of_year(), 3),
            'w' => (self.weekday().into(), 0),
            'u' => ((u16::from(self.weekday()) + 6) % 7 + 1, 0),
            'f' => (0, 6),
            other => {
                out.push_str(&match other {
                    'B' => month.to_owned(),
                    'b' | 'h' => month[..3].to_owned(),
                    'A' => day.to_owned(),
                    'a' => day[..3].to_owned(),
                    'p' => half.to_owned(),
                    'F' => self.format("%Y-%m-%d").ok()?,
                    'T' | 'X' => self.format("%H:%M:%S").ok()?,
                    'R' => self.format("%H:%M").ok()?,
                    'D' | 'x' => self.format("%m/%d/%y").ok()?,
                    'c' => self.format("%a %b ").ok()? + &self.end_of_c(),
                    'e' => format!("{:>2}", self.day),
                    'Z' | 'z' => String::new(),
                    'n' => "\n".to_owned(),
                    't' => "\t".to_owned(),
                    '%' => "%".to_owned(),
                    _ => return None,
                });
                return Some(());
            }
        };
        let width = if padded { width } else { 0 };
        write!(out, "{value:0width$}").ok()
    }

    fn end_of_c(self) -> String {
        let (day, hour, minute, second) = (self.day, self.hour, self.minute, self.second);
        format!("{day:>2} {hour:02}:{minute:02}:{second:02} {}", self.year)
    }

    fn day_of_year(self) -> u16 {
        let before: u16 = (1..u16::from(self.month)).map(|m| days_in(self.year, m)).sum();
        before + u16::from(self.day)
    }

    /// 0 is Sunday. Counts the days since the first of January of year 1, a Monday (proleptic
    /// Gregorian calendar).
    fn weekday(self) -> u8 {
        let years = u32::from(self.year) - 1;
        let days = years * 365 + years / 4 - years / 100 + years / 400;
        ((days + u32::from(self.day_of_year())) % 7) as u8
    }
}

impl std::fmt::Display for Date {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.format("%Y-%m-%dT%H:%M:%S").map_err(|_| std::fmt::Error)?)
    }
}

fn days_in(year: u16, month: u16) -> u16 {
    let is_leap = year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    match month {
        2 => 28 + u16::from(is_leap),
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(date: &str, form: &str, expect: &str) {
        let date = Date::parse(date).expect("a date");
        assert_eq!(date.format(form).expect("known directives"), expect);
    }

    #[test]
    fn dates_format_as_in_c() {
        check("2026-01-02", "%d %b %Y", "02 Jan 2026");
        check("2026-01-02", "%-d %B %y, %A", "2 January 26, Friday");
        check("2024-12-31", "%j %u %w %a %e%%", "366 2 2 Tue 31%");
        check("2026-01-02T15:04:05", "%H:%M:%S %I %p %-I", "15:04:05 03 PM 3");
        check("2000-02-29T00:30:00", "%F %T %D %R %I%p", "2000-02-29 00:30:00 02/29/00 00:30 12AM");
        check("2026-01-02T03:04:05", "%c", "Fri Jan  2 03:04:05 2026");
    }

    #[test]
    fn what_is_no_date_is_refused() {
        for text in
            ["", "2026-1-2", "2026-02-29", "2026-13-01", "2026-01-02T24:00:00", "+026-01-02"]
        {
            assert!(Date::parse(text).is_err(), "{text}");
        }
        assert!(Date::parse("2026-01-02").unwrap().format("%Q").is_err());
        assert!(Date::parse("2026-01-02").unwrap().format("%").is_err());
    }
}
