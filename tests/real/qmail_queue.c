/* What qmail-queue is to qmail-smtpd: a setuid program that reads a letter on fd 0, its envelope on fd 1, and keeps both in the folder
   named when it was compiled, where only its owner may write. It fails unless its effective user differs from the real one. */
#include <fcntl.h>
#include <unistd.h>

static int keep(int from, const char *path)
{
  char chunk[4096];
  ssize_t n;
  int to = open(path, O_WRONLY | O_CREAT | O_EXCL, 0644);
  if (to < 0) return 0;
  while ((n = read(from, chunk, sizeof chunk)) > 0)
    if (write(to, chunk, n) != n) return 0;
  return n == 0 && close(to) == 0;
}

int main(void)
{
  if (geteuid() == getuid()) return 120;
  if (!keep(0, FOLDER "/letter") || !keep(1, FOLDER "/envelope")) return 53;
  return 0;
}
