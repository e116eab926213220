"""Delivers one letter with the standard library: HOST PORT clear|TLSv1.2|TLSv1.3 CA SENDER RECIPIENT FILE."""

import smtplib
import ssl
import sys

host, port, mode, ca, sender, recipient, file = sys.argv[1:]
with open(file, "rb") as letter, smtplib.SMTP(host, int(port), local_hostname="client.example", timeout=30) as smtp:
    smtp.ehlo()
    if not smtp.has_extn("starttls"):
        sys.exit("STARTTLS is not offered")
    if mode != "clear":
        context = ssl.create_default_context(cafile=ca)
        context.minimum_version = context.maximum_version = ssl.TLSVersion[mode.replace(".", "_")]
        smtp.starttls(context=context)
        if smtp.sock.version() != mode:
            sys.exit(f"{smtp.sock.version()} instead of {mode}")
        smtp.ehlo()
        if smtp.has_extn("starttls"):
            sys.exit("STARTTLS is offered inside TLS")
    smtp.sendmail(sender, [recipient], letter.read())
